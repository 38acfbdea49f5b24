//! The ways in which addresses are disguised, against a listener that nothing may reach.

use std::net::{Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use blipstream::disposition::{Code, Disposed};
use blipstream::message::ImageRef;
use tokio::net::TcpListener;

use super::{fetcher, pool, settings};

/// A reference a line; `#` begins a comment, and `{port}` is the listener's.
const DISGUISES: &str = include_str!("../fixtures/ssrf.txt");

/// Counts connections to any address of this machine, in IPv4 and IPv6.
async fn canary() -> (u16, Arc<AtomicUsize>) {
    let any = SocketAddr::from((Ipv6Addr::UNSPECIFIED, 0));
    let listener = TcpListener::bind(any).await.unwrap();
    let (port, connections) = (listener.local_addr().unwrap().port(), Arc::new(AtomicUsize::new(0)));
    let counter = connections.clone();
    tokio::spawn(async move {
        while listener.accept().await.is_ok() {
            counter.fetch_add(1, Ordering::SeqCst);
        }
    });
    (port, connections)
}

#[tokio::test]
async fn no_disguise_of_an_address_reaches_this_machine() {
    let (port, connections) = canary().await;
    // The port is no reason to refuse, so that the address has to be.
    let closed = settings::Fetch { allow_networks: Vec::new(), allow_ports: Vec::new(), attempts: 1, ..settings() };
    let fetcher = fetcher(&closed, &pool());
    let own = if_addrs::get_if_addrs().unwrap().into_iter().map(|interface| match interface.ip() {
        std::net::IpAddr::V4(ip) => format!("http://{ip}:{port}/"),
        std::net::IpAddr::V6(ip) => format!("http://[{ip}]:{port}/"),
    });
    let lines = DISGUISES.lines().filter(|line| !line.is_empty() && !line.starts_with('#'));
    let mut tried = 0;
    for text in lines.map(|line| line.replace("{port}", &port.to_string())).chain(own) {
        tried += 1;
        let Ok(image) = ImageRef::parse(&text) else { continue };
        let failed = fetcher.fetch(&image, None).await.expect_err(&text);
        // A name that no server knows leads nowhere; base64 and files are none of this.
        let refused =
            matches!(failed.code(), Code::BlockedAddress | Code::BadReference | Code::Dns | Code::AccessDenied);
        assert!(refused, "{text}: {failed}");
    }
    assert!(tried > 100, "{tried}");
    assert_eq!(connections.load(Ordering::SeqCst), 0);
    // The listener does count.
    tokio::net::TcpStream::connect(("127.0.0.1", port)).await.unwrap();
    while connections.load(Ordering::SeqCst) == 0 {
        tokio::task::yield_now().await;
    }
}
