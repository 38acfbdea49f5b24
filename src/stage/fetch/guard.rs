//! Who may be reached: public addresses on the usual ports, and configured networks.
//!
//! A request is a stranger's, and so is every redirect and every DNS answer; without this guard a worker would read
//! the metadata service or the admin pages of its own network for them. The guard runs on the URL (an IP literal is
//! never resolved), on what a name resolves to, and on the connected peer.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use ipnet::IpNet;
use reqwest::dns::{Addrs, Name, Resolve, Resolving};
use url::{Host, Url};

use super::FetchError;
use super::address::{is_public, unwrap};
use crate::settings;

/// What no setting opens.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    /// An address that is not public.
    #[error("{0} is not a public address; if it is to be reached, add its network to fetch.allow_networks")]
    NotPublic(IpAddr),
    /// A public address of the machine that the worker runs on.
    #[error("{0} is the worker's own machine; if it is to be reached, add it to fetch.allow_networks")]
    Own(IpAddr),
    /// A port of a public host that images do not come from.
    #[error(
        "no images are fetched from port {0} of public hosts; if they are to be, add it to fetch.allow_ports, or the host's network to fetch.allow_networks"
    )]
    Port(u16),
}

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
pub struct Guard(Arc<Rules>);

#[derive(Debug)]
struct Rules {
    allowed: Vec<IpNet>,
    /// Public ports; none named means all.
    ports: Vec<u16>,
    /// Public addresses of this machine, as they were at the start.
    own: Vec<IpAddr>,
    /// The egress proxy: it connects to hosts, and nobody else is connected to.
    proxy: Option<Url>,
}

impl Guard {
    /// The guard of these settings, on this machine.
    pub fn new(settings: &settings::Fetch) -> Self {
        Self::on_machine_with(settings, own_addresses())
    }

    fn on_machine_with(settings: &settings::Fetch, own: Vec<IpAddr>) -> Self {
        let settings::Fetch { allow_networks, allow_ports, proxy, .. } = settings;
        let (allowed, ports, proxy) = (allow_networks.clone(), allow_ports.clone(), proxy.clone());
        Self(Arc::new(Rules { allowed, ports, own, proxy }))
    }

    fn opens(&self, address: IpAddr) -> bool {
        let opened = |ip: IpAddr| self.0.allowed.iter().any(|net| net.contains(&ip));
        opened(address) || opened(unwrap(address))
    }

    /// Whether an address may be reached.
    pub fn check(&self, address: IpAddr) -> Result<(), Refused> {
        if self.opens(address) {
            return Ok(());
        }
        match unwrap(address) {
            _ if !is_public(address) => Err(Refused::NotPublic(address.to_canonical())),
            plain if self.0.own.contains(&plain) => Err(Refused::Own(plain)),
            _ => Ok(()),
        }
    }

    /// Whether the peer of a connection may be what it is.
    pub fn check_peer(&self, peer: IpAddr) -> Result<(), Refused> {
        if self.0.proxy.is_some() { Ok(()) } else { self.check(peer) }
    }

    /// Whether a URL may be asked, as far as it can be told without a look-up: the host where it is an address, and the port.
    pub fn check_url(&self, url: &Url) -> Result<(), FetchError> {
        let address = match url.host() {
            Some(Host::Ipv4(ip)) => ip.into(),
            Some(Host::Ipv6(ip)) => ip.into(),
            Some(Host::Domain(_)) if self.has_usual_port(url) || self.may_be_opened() => return Ok(()),
            Some(Host::Domain(_)) | None => return Err(Refused::Port(port(url)).into()),
        };
        self.check(address)?;
        if self.has_usual_port(url) || self.opens(address) { Ok(()) } else { Err(Refused::Port(port(url)).into()) }
    }

    /// The rest of that, which may take a while: names with an unusual port have to lead to open networks, where all ports
    /// are open. The client looks names up by itself, and what it finds is judged again.
    pub async fn check_name(&self, url: &Url) -> Result<(), FetchError> {
        let Some(Host::Domain(name)) = url.host() else { return Ok(()) };
        if self.has_usual_port(url) {
            return Ok(());
        }
        let found = lookup(name).await.map_err(FetchError::Dns)?;
        found.iter().try_for_each(|address| self.check(address.ip()))?;
        let opened = found.iter().all(|address| self.opens(address.ip()));
        if opened { Ok(()) } else { Err(Refused::Port(port(url)).into()) }
    }

    fn has_usual_port(&self, url: &Url) -> bool {
        self.0.ports.is_empty() || self.0.ports.contains(&port(url))
    }

    /// Whether some name can lead to an open network: behind a proxy nobody here knows where one leads.
    fn may_be_opened(&self) -> bool {
        self.0.proxy.is_none() && !self.0.allowed.is_empty()
    }

    /// The addresses of a name, if every one of them may be reached. One bad address refuses the name: an honest
    /// name does not mix them, and one that does is an attempt to have the wrong one picked.
    fn vet(&self, name: &str, addresses: Vec<SocketAddr>) -> Result<Vec<SocketAddr>, Refused> {
        if self.0.proxy.as_ref().and_then(Url::host_str) != Some(name) {
            addresses.iter().try_for_each(|address| self.check(address.ip()))?;
        }
        Ok(addresses)
    }
}

fn port(url: &Url) -> u16 {
    url.port_or_known_default().unwrap_or_default()
}

/// The public addresses of this machine's interfaces; the others are refused anyway.
fn own_addresses() -> Vec<IpAddr> {
    let interfaces = if_addrs::get_if_addrs().unwrap_or_else(|error| {
        tracing::warn!(%error, "the machine's own addresses are unknown; its public ones, if any, may be fetched from");
        Vec::new()
    });
    interfaces.iter().map(if_addrs::Interface::ip).filter(|ip| is_public(*ip)).collect()
}

/// The addresses of a name, one at least, by the system's resolver.
async fn lookup(name: &str) -> Result<Vec<SocketAddr>, LookupError> {
    let found: Vec<SocketAddr> = tokio::net::lookup_host((name, 0)).await?.collect();
    if found.is_empty() {
        return Err(LookupError { unknown_name: true, cause: "the name has no address".into() });
    }
    Ok(found)
}

/// The system's resolver behind the guard.
#[derive(Debug)]
pub struct GuardedResolver(pub Guard);

impl Resolve for GuardedResolver {
    fn resolve(&self, name: Name) -> Resolving {
        let guard = self.0.clone();
        Box::pin(async move {
            let found = lookup(name.as_str()).await?;
            Ok(Box::new(guard.vet(name.as_str(), found)?.into_iter()) as Addrs)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::settings;
    use ipnet::Ipv4Net;
    use proptest::prelude::*;
    use std::net::Ipv4Addr;

    fn guard(allow_networks: Vec<IpNet>) -> Guard {
        let settings = settings::Fetch { allow_networks, ..settings::Fetch::default() };
        Guard::on_machine_with(&settings, vec![ip("93.184.216.34"), ip("2606:2800:220:1::1")])
    }

    fn closed() -> Guard {
        guard(Vec::new())
    }

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    fn check(guard: &Guard, url: &str) -> Result<(), FetchError> {
        guard.check_url(&Url::parse(url).unwrap())
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
            assert!(matches!(check(&closed(), text), Err(FetchError::Blocked(Refused::NotPublic(_)))), "{text}");
        }
        assert_eq!(check(&closed(), "http://example.com/"), Ok(()));
    }

    #[test]
    fn one_bad_address_refuses_the_whole_name() {
        let mixed = vec![SocketAddr::new(ip("8.8.8.8"), 0), SocketAddr::new(ip("10.0.0.1"), 0)];
        assert_eq!(closed().vet("a.example", mixed), Err(Refused::NotPublic(ip("10.0.0.1"))));
        let good = vec![SocketAddr::new(ip("8.8.8.8"), 0), SocketAddr::new(ip("2606:4700::1"), 0)];
        assert_eq!(closed().vet("a.example", good.clone()), Ok(good));
    }

    #[test]
    fn the_machines_own_public_addresses_are_refused_unless_they_are_opened() {
        for own in ["93.184.216.34", "::ffff:93.184.216.34", "64:ff9b::5db8:d822", "2606:2800:220:1::1"] {
            assert!(matches!(closed().check(ip(own)), Err(Refused::Own(_))), "{own}");
        }
        assert_eq!(closed().check(ip("93.184.216.35")), Ok(()));
        let opened = guard(vec!["93.184.216.34/32".parse().unwrap()]);
        assert_eq!(opened.check(ip("::ffff:93.184.216.34")), Ok(()));
    }

    #[test]
    fn public_hosts_are_asked_on_usual_ports_and_open_networks_on_all() {
        for url in ["http://8.8.8.8/", "https://8.8.8.8/", "http://8.8.8.8:8080/", "https://[2606:4700::1]:443/"] {
            assert_eq!(check(&closed(), url), Ok(()), "{url}");
        }
        for (url, port) in
            [("http://8.8.8.8:22/", 22), ("https://8.8.8.8:6379/", 6379), ("http://[2606:4700::1]:25/", 25)]
        {
            assert_eq!(check(&closed(), url), Err(Refused::Port(port).into()), "{url}");
        }
        let opened = guard(vec!["10.0.0.0/8".parse().unwrap()]);
        assert_eq!(check(&opened, "http://10.1.2.3:9000/"), Ok(()));
        assert_eq!(check(&opened, "http://[::ffff:10.1.2.3]:9000/"), Ok(()));
        let any = settings::Fetch { allow_ports: Vec::new(), ..settings::Fetch::default() };
        assert_eq!(check(&Guard::on_machine_with(&any, Vec::new()), "http://8.8.8.8:22/"), Ok(()));
    }

    #[test]
    fn behind_a_proxy_only_the_proxy_is_connected_to() {
        let proxy = Some("http://proxy.internal:3128".parse().unwrap());
        let settings = settings::Fetch { proxy, ..settings::Fetch::default() };
        let guard = Guard::on_machine_with(&settings, Vec::new());
        let inside = vec![SocketAddr::new(ip("10.0.0.1"), 0)];
        assert_eq!(guard.vet("proxy.internal", inside.clone()), Ok(inside.clone()));
        assert!(guard.vet("other.internal", inside).is_err());
        assert_eq!(guard.check_peer(ip("10.0.0.1")), Ok(()));
        // What the proxy resolves has no port that could be known to be open.
        assert!(check(&guard, "http://10.0.0.1/").is_err());
        assert_eq!(check(&guard, "http://a.example:22/"), Err(Refused::Port(22).into()));
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
        fn an_allowed_network_opens_itself_and_nothing_else(bits: u32, prefix in 8u8..=32, probe: u32) {
            let net = Ipv4Net::new(Ipv4Addr::from(bits), prefix).unwrap().trunc();
            let guard = guard(vec![net.into()]);
            let inside = Ipv4Addr::from(u32::from(net.network()) | (probe & u32::from(net.hostmask())));
            prop_assert_eq!(guard.check(inside.into()), Ok(()));
            prop_assert_eq!(guard.check(inside.to_ipv6_mapped().into()), Ok(()));
            let any = Ipv4Addr::from(probe);
            prop_assume!(!guard.0.own.contains(&any.into()));
            prop_assert_eq!(guard.check(any.into()).is_ok(), is_public(any.into()) || net.contains(&any));
        }
    }
}
