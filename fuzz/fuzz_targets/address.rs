//! The guard in front of private networks, held to what the standard library calls private.

#![no_main]

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use blipstream::settings::Fetch;
use blipstream::stage::fetch::address::is_public;
use blipstream::stage::fetch::guard::Guard;
use ipnet::{IpNet, Ipv4Net};
use libfuzzer_sys::fuzz_target;
use url::{Host, Url};

fuzz_target!(|input: (Ipv4Addr, Ipv6Addr, Ipv4Addr, u8, &str)| {
    let (v4, v6, network, prefix, text) = input;
    let network = Ipv4Net::new(network, prefix % 33).expect("a prefix of at most 32 bits");
    let (closed, opened) = (guard(Vec::new()), guard(vec![network.into()]));

    for address in [IpAddr::from(v4), v6.into()] {
        let let_through = closed.check(address).is_ok();
        assert_eq!(let_through, is_public(address), "{address}");
        assert!(!(let_through && is_inside(address)), "{address}");
        assert!(!let_through || opened.check(address).is_ok(), "{address}");
    }
    for guard in [&closed, &opened] {
        let expected = guard.check(v4.into()).is_ok();
        for wrapped in wrappings(v4) {
            assert_eq!(guard.check(wrapped.into()).is_ok(), expected, "{wrapped}");
        }
    }
    assert_eq!(opened.check(v4.into()).is_ok(), is_public(v4.into()) || network.contains(&v4));

    let number = u32::from(v4);
    for host in [v4.to_string(), number.to_string(), format!("{number:#x}"), format!("0{number:o}")] {
        let url = Url::parse(&format!("http://{host}/")).expect("a spelling of an IPv4 address");
        assert_eq!(lets_through(&closed, &url), is_public(v4.into()), "{url}");
    }
    let url = Url::parse(&format!("https://[{v6}]/")).expect("an IPv6 address");
    assert_eq!(lets_through(&closed, &url), is_public(v6.into()), "{url}");

    for url in [text.to_owned(), format!("http://{text}/")].iter().filter_map(|text| Url::parse(text).ok()) {
        let literal = match url.host() {
            Some(Host::Ipv4(ip)) => ip.into(),
            Some(Host::Ipv6(ip)) => ip.into(),
            Some(Host::Domain(_)) | None => continue,
        };
        assert!(!(lets_through(&closed, &url) && is_inside(literal)), "{url}");
    }
});

/// A guard that opens these networks, and every port.
fn guard(allow_networks: Vec<IpNet>) -> Guard {
    Guard::new(&Fetch { allow_networks, allow_ports: Vec::new(), ..Fetch::default() })
}

/// Of a URL whose host is an address, so that nothing is looked up.
fn lets_through(guard: &Guard, url: &Url) -> bool {
    guard.check_url(url).is_ok()
}

/// Whether the standard library knows an address, or the IPv4 address in it, as one of a machine or a private network.
fn is_inside(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(ip) => {
            ip.is_private()
                || ip.is_loopback()
                || ip.is_link_local()
                || ip.is_unspecified()
                || ip.is_multicast()
                || ip.is_broadcast()
                || ip.is_documentation()
        }
        IpAddr::V6(ip) => {
            ip.is_loopback()
                || ip.is_unspecified()
                || ip.is_unique_local()
                || ip.is_unicast_link_local()
                || ip.is_multicast()
                || ip.to_ipv4().is_some_and(|inner| is_inside(inner.into()))
        }
    }
}

/// The IPv6 addresses that lead to an IPv4 address: mapped, and by NAT64 (RFC 6052).
fn wrappings(ip: Ipv4Addr) -> [Ipv6Addr; 2] {
    let nat64 = Ipv6Addr::new(0x64, 0xff9b, 0, 0, 0, 0, 0, 0);
    [ip.to_ipv6_mapped(), Ipv6Addr::from(u128::from(nat64) | u128::from(u32::from(ip)))]
}
