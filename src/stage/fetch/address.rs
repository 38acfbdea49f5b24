//! Which addresses are globally reachable; who may be reached is decided in [`super::guard`].

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::{Ipv4Net, Ipv6Net};

const fn v4(a: u8, b: u8, c: u8, d: u8, prefix: u8) -> Ipv4Net {
    Ipv4Net::new_assert(Ipv4Addr::new(a, b, c, d), prefix)
}

const fn v6(a: u16, b: u16, prefix: u8) -> Ipv6Net {
    Ipv6Net::new_assert(Ipv6Addr::new(a, b, 0, 0, 0, 0, 0, 0), prefix)
}

/// IPv4 networks that are not globally reachable: the IANA special-purpose registry (RFC 6890 and its updates),
/// multicast, the reserved class E, and what clouds serve their metadata at.
const NOT_PUBLIC_V4: [Ipv4Net; 17] = [
    v4(0, 0, 0, 0, 8),        // this network
    v4(10, 0, 0, 0, 8),       // private
    v4(100, 64, 0, 0, 10),    // shared by carriers (CGNAT)
    v4(127, 0, 0, 0, 8),      // loopback
    v4(168, 63, 129, 16, 32), // Azure's own services for each machine, behind a public address
    v4(169, 254, 0, 0, 16),   // link-local, the metadata services of clouds among them
    v4(172, 16, 0, 0, 12),    // private
    v4(192, 0, 0, 0, 24),     // protocol assignments
    v4(192, 0, 2, 0, 24),     // documentation
    v4(192, 88, 99, 0, 24),   // relays of 6to4, given up
    v4(192, 168, 0, 0, 16),   // private
    v4(198, 18, 0, 0, 15),    // benchmarking
    v4(198, 51, 100, 0, 24),  // documentation
    v4(203, 0, 113, 0, 24),   // documentation
    v4(224, 0, 0, 0, 4),      // multicast
    v4(240, 0, 0, 0, 4),      // reserved
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

/// Whether an address is globally reachable. IPv4 addresses inside IPv6 ones (mapped, NAT64, ISATAP) are judged as IPv4.
pub fn is_public(address: IpAddr) -> bool {
    match unwrap(address) {
        IpAddr::V4(ip) => !NOT_PUBLIC_V4.iter().any(|net| net.contains(&ip)),
        IpAddr::V6(ip) => {
            let tunnel = isatap(ip).is_some_and(|inner| !is_public(inner.into()));
            GLOBAL_UNICAST_V6.contains(&ip) && !NOT_PUBLIC_V6.iter().any(|net| net.contains(&ip)) && !tunnel
        }
    }
}

/// The IPv4 address in the interface identifier of an ISATAP address (RFC 5214): a router of such a site sends there.
fn isatap(address: Ipv6Addr) -> Option<Ipv4Addr> {
    let [.., a, b, c, d] = address.octets();
    let [.., high, low, _, _] = address.segments();
    // With the bit that says whether the IPv4 address is unique in the world, or without.
    (high & !0x200 == 0 && low == 0x5efe).then(|| Ipv4Addr::new(a, b, c, d))
}

/// The IPv4 address that an IPv6 address leads to, or the address itself.
pub(super) fn unwrap(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(ip) if NAT64.contains(&ip) => {
            let [.., a, b, c, d] = ip.octets();
            IpAddr::V4(Ipv4Addr::new(a, b, c, d))
        }
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

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
            "168.63.129.16",
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
            "2606:4700::5efe:10.0.0.1",
            "2606:4700::200:5efe:7f00:1",
            "3fff::1",
            "fc00::1",
            "fd00:ec2::254",
            "fe80::1",
            "fec0::1",
            "ff02::1",
            "4000::1",
        ] {
            assert!(!is_public(ip(text)), "{text} was let through");
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
            "2606:4700::5efe:8.8.8.8",
            "168.63.129.15",
            "::ffff:8.8.8.8",
        ] {
            assert!(is_public(ip(text)), "{text} was refused");
        }
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

    }
}
