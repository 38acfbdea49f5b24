//! Which addresses may be reached: public ones, and those of configured networks.
//!
//! A request is a stranger's, and so is every redirect and every DNS answer; without this guard a worker would read
//! the metadata service or the admin pages of its own network for them. The guard runs on the URL (an IP literal is
//! never resolved), on what a name resolves to, and on the connected peer.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use reqwest::dns::{Addrs, Name, Resolve, Resolving};
use url::{Host, Url};

const fn v4(a: u8, b: u8, c: u8, d: u8, prefix: u8) -> Ipv4Net {
    Ipv4Net::new_assert(Ipv4Addr::new(a, b, c, d), prefix)
}

const fn v6(a: u16, b: u16, prefix: u8) -> Ipv6Net {
    Ipv6Net::new_assert(Ipv6Addr::new(a, b, 0, 0, 0, 0, 0, 0), prefix)
}

/// IPv4 networks that are not globally reachable: the IANA special-purpose registry (RFC 6890 and its updates),
/// multicast and the reserved class E.
const NOT_PUBLIC_V4: [Ipv4Net; 16] = [
    v4(0, 0, 0, 0, 8),       // this network
    v4(10, 0, 0, 0, 8),      // private
    v4(100, 64, 0, 0, 10),   // shared by carriers (CGNAT)
    v4(127, 0, 0, 0, 8),     // loopback
    v4(169, 254, 0, 0, 16),  // link-local, the metadata services of clouds among them
    v4(172, 16, 0, 0, 12),   // private
    v4(192, 0, 0, 0, 24),    // protocol assignments
    v4(192, 0, 2, 0, 24),    // documentation
    v4(192, 88, 99, 0, 24),  // relays of 6to4, given up
    v4(192, 168, 0, 0, 16),  // private
    v4(198, 18, 0, 0, 15),   // benchmarking
    v4(198, 51, 100, 0, 24), // documentation
    v4(203, 0, 113, 0, 24),  // documentation
    v4(224, 0, 0, 0, 4),     // multicast
    v4(240, 0, 0, 0, 4),     // reserved
    v4(255, 255, 255, 255, 32),
];

/// The only IPv6 space that is handed out for public hosts (RFC 4291). Loopback, unspecified, IPv4-compatible,
/// NAT64 with a local prefix, unique-local, link-local, site-local and multicast addresses all lie outside it.
const GLOBAL_UNICAST_V6: Ipv6Net = v6(0x2000, 0, 3);

/// What is not public inside of it.
const NOT_PUBLIC_V6: [Ipv6Net; 4] = [
    v6(0x2001, 0, 23),     // protocol assignments: Teredo, benchmarking, ORCHID
    v6(0x2001, 0xdb8, 32), // documentation
    v6(0x2002, 0, 16),     // 6to4: an IPv4 address in disguise, given up
    v6(0x3fff, 0, 20),     // documentation
];

/// NAT64's well-known prefix (RFC 6052); in a network without IPv4 every IPv4 host appears below it.
const NAT64: Ipv6Net = v6(0x64, 0xff9b, 96);

/// Whether an address is globally reachable. IPv4 addresses inside IPv6 ones (mapped, NAT64) are judged as IPv4.
pub fn is_public(address: IpAddr) -> bool {
    match unwrap(address) {
        IpAddr::V4(ip) => !NOT_PUBLIC_V4.iter().any(|net| net.contains(&ip)),
        IpAddr::V6(ip) => GLOBAL_UNICAST_V6.contains(&ip) && !NOT_PUBLIC_V6.iter().any(|net| net.contains(&ip)),
    }
}

/// The IPv4 address that an IPv6 address leads to, or the address itself.
fn unwrap(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(ip) if NAT64.contains(&ip) => {
            let [.., a, b, c, d] = ip.octets();
            IpAddr::V4(Ipv4Addr::new(a, b, c, d))
        }
        other => other,
    }
}

/// An address that is not public and that no setting opens.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{0} is not a public address")]
pub struct Refused(pub IpAddr);

/// A name that did not resolve.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{cause}")]
pub struct LookupError {
    /// Whether there is no such name, as far as the resolver says.
    pub unknown_name: bool,
    /// The resolver's words.
    pub cause: String,
}

/// What resolvers say of a name that does not exist or has no address: glibc, musl, macOS. The codes of `getaddrinfo`
/// do not pass through the standard library; another wording only means that the lookup is tried again.
const UNKNOWN_NAME: [&str; 5] = [
    "Name or service not known",
    "No address associated with hostname",
    "Name does not resolve",
    "Name has no usable address",
    "nodename nor servname provided",
];

impl From<io::Error> for LookupError {
    fn from(error: io::Error) -> Self {
        let cause = error.to_string();
        Self { unknown_name: UNKNOWN_NAME.iter().any(|words| cause.contains(words)), cause }
    }
}

/// Lets public addresses through, and those of the allowed networks. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Guard {
    allowed: Arc<[IpNet]>,
}

impl Guard {
    /// A guard that opens `allowed` besides what is public.
    pub fn new(allowed: &[IpNet]) -> Self {
        Self { allowed: allowed.into() }
    }

    /// Whether an address may be reached.
    pub fn check(&self, address: IpAddr) -> Result<(), Refused> {
        let opened = |ip: IpAddr| self.allowed.iter().any(|net| net.contains(&ip));
        let open = is_public(address) || opened(address) || opened(unwrap(address));
        if open { Ok(()) } else { Err(Refused(address.to_canonical())) }
    }

    /// Whether the host of a URL may be reached, where it is an address; names are judged once they are resolved.
    pub fn check_url(&self, url: &Url) -> Result<(), Refused> {
        match url.host() {
            Some(Host::Ipv4(ip)) => self.check(ip.into()),
            Some(Host::Ipv6(ip)) => self.check(ip.into()),
            Some(Host::Domain(_)) | None => Ok(()),
        }
    }

    /// The addresses of a name, if every one of them may be reached. One bad address refuses the name: an honest
    /// name does not mix them, and one that does is an attempt to have the wrong one picked.
    fn vet(&self, addresses: Vec<SocketAddr>) -> Result<Vec<SocketAddr>, Refused> {
        addresses.iter().try_for_each(|address| self.check(address.ip()))?;
        Ok(addresses)
    }
}

/// The system's resolver behind the guard.
#[derive(Debug)]
pub struct GuardedResolver(pub Guard);

impl Resolve for GuardedResolver {
    fn resolve(&self, name: Name) -> Resolving {
        let guard = self.0.clone();
        Box::pin(async move {
            let found: Vec<SocketAddr> =
                tokio::net::lookup_host((name.as_str(), 0)).await.map_err(LookupError::from)?.collect();
            if found.is_empty() {
                return Err(LookupError { unknown_name: true, cause: "the name has no address".into() }.into());
            }
            Ok(Box::new(guard.vet(found)?.into_iter()) as Addrs)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn closed() -> Guard {
        Guard::new(&[])
    }

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    #[test]
    fn refuses_every_class_of_address_that_is_not_public() {
        for text in [
            "0.0.0.0",
            "0.1.2.3",
            "10.0.0.1",
            "100.64.0.1",
            "100.127.255.255",
            "127.0.0.1",
            "127.255.0.1",
            "169.254.169.254",
            "172.16.0.1",
            "172.31.255.255",
            "192.0.0.8",
            "192.0.2.1",
            "192.88.99.1",
            "192.168.1.1",
            "198.18.0.1",
            "198.19.255.255",
            "198.51.100.7",
            "203.0.113.7",
            "224.0.0.1",
            "239.255.255.255",
            "240.0.0.1",
            "255.255.255.255",
            "::",
            "::1",
            "::7f00:1",
            "::ffff:127.0.0.1",
            "::ffff:169.254.169.254",
            "64:ff9b::7f00:1",
            "64:ff9b::a9fe:a9fe",
            "64:ff9b:1::1",
            "100::1",
            "2001::1",
            "2001:0:4136:e378::1",
            "2001:2::1",
            "2001:10::1",
            "2001:20::1",
            "2001:db8::1",
            "2002:7f00:1::1",
            "2002:808:808::1",
            "3fff::1",
            "fc00::1",
            "fd00:ec2::254",
            "fe80::1",
            "fec0::1",
            "ff02::1",
            "4000::1",
        ] {
            assert!(closed().check(ip(text)).is_err(), "{text} was let through");
        }
    }

    #[test]
    fn lets_public_addresses_through() {
        for text in [
            "1.1.1.1",
            "8.8.8.8",
            "93.184.216.34",
            "100.63.255.255",
            "100.128.0.0",
            "172.15.255.255",
            "172.32.0.0",
            "192.0.1.1",
            "198.17.255.255",
            "198.20.0.0",
            "223.255.255.255",
            "2606:4700::1111",
            "2001:4860:4860::8888",
            "2a00:1450::1",
            "64:ff9b::808:808",
            "::ffff:8.8.8.8",
        ] {
            assert_eq!(closed().check(ip(text)), Ok(()), "{text} was refused");
        }
    }

    #[test]
    fn judges_every_spelling_of_an_address_in_a_url() {
        for text in [
            "http://127.0.0.1/",
            "http://2130706433/",
            "http://0x7f000001/",
            "http://0177.0.0.1/",
            "http://127.1/",
            "http://0/",
            "http://[::1]/",
            "http://[::ffff:127.0.0.1]/",
            "http://[::ffff:a9fe:a9fe]/",
            "http://0xa9.0xfe.0xa9.0xfe/",
            "https://user:pw@10.0.0.1:8443/x?y",
        ] {
            assert!(closed().check_url(&Url::parse(text).unwrap()).is_err(), "{text} was let through");
        }
        assert_eq!(closed().check_url(&Url::parse("http://example.com/").unwrap()), Ok(()));
    }

    #[test]
    fn one_bad_address_refuses_the_whole_name() {
        let mixed = vec![SocketAddr::new(ip("8.8.8.8"), 0), SocketAddr::new(ip("10.0.0.1"), 0)];
        assert_eq!(closed().vet(mixed), Err(Refused(ip("10.0.0.1"))));
        let good = vec![SocketAddr::new(ip("8.8.8.8"), 0), SocketAddr::new(ip("2606:4700::1"), 0)];
        assert_eq!(closed().vet(good.clone()), Ok(good));
    }

    #[test]
    fn an_unknown_name_is_told_from_a_resolver_that_is_down() {
        let failed =
            |words: &str| LookupError::from(io::Error::other(format!("failed to lookup address information: {words}")));
        assert!(failed("Name or service not known").unknown_name);
        assert!(!failed("Temporary failure in name resolution").unknown_name);
    }

    proptest! {
        #[test]
        fn what_the_standard_library_calls_special_is_never_public(bits: u32) {
            let ip = Ipv4Addr::from(bits);
            let special = ip.is_private() || ip.is_loopback() || ip.is_link_local() || ip.is_multicast()
                || ip.is_broadcast() || ip.is_documentation() || ip.is_unspecified();
            prop_assert!(!(special && is_public(ip.into())));
        }

        #[test]
        fn an_address_inside_a_refused_network_is_refused(net in 0..NOT_PUBLIC_V4.len(), bits: u32) {
            let net = NOT_PUBLIC_V4[net];
            let inside = Ipv4Addr::from(u32::from(net.network()) | (bits & u32::from(net.hostmask())));
            prop_assert!(!is_public(inside.into()));
        }

        #[test]
        fn an_ipv4_address_is_judged_alike_in_every_wrapping(bits: u32) {
            let ip = Ipv4Addr::from(bits);
            let mapped = ip.to_ipv6_mapped();
            let nat64 = Ipv6Addr::from(u128::from(NAT64.network()) | u128::from(bits));
            prop_assert_eq!(is_public(ip.into()), is_public(mapped.into()));
            prop_assert_eq!(is_public(ip.into()), is_public(nat64.into()));
        }

        #[test]
        fn ipv6_outside_global_unicast_is_never_public(bits: u128) {
            let ip = Ipv6Addr::from(bits);
            let wrapped = matches!(unwrap(ip.into()), IpAddr::V4(_));
            prop_assert!(wrapped || ip.segments()[0] >> 13 == 1 || !is_public(ip.into()));
        }

        #[test]
        fn an_allowed_network_opens_itself_and_nothing_else(bits: u32, prefix in 8u8..=32, probe: u32) {
            let net = Ipv4Net::new(Ipv4Addr::from(bits), prefix).unwrap().trunc();
            let guard = Guard::new(&[net.into()]);
            let inside = Ipv4Addr::from(u32::from(net.network()) | (probe & u32::from(net.hostmask())));
            prop_assert_eq!(guard.check(inside.into()), Ok(()));
            prop_assert_eq!(guard.check(inside.to_ipv6_mapped().into()), Ok(()));
            let any = Ipv4Addr::from(probe);
            prop_assert_eq!(guard.check(any.into()).is_ok(), is_public(any.into()) || net.contains(&any));
        }
    }
}
