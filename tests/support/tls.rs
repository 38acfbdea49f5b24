//! TLS servers with certificates that are no good.

use std::net::{SocketAddr, TcpListener};
use std::sync::Arc;

use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};

/// For localhost, and nobody has signed it.
pub const SELF_SIGNED: &[u8] = include_bytes!("self_signed.pem");
/// For `other.example`, signed by [`AUTHORITY`].
pub const OTHER_NAME: &[u8] = include_bytes!("other_name.pem");
/// The file of the authority that has signed [`OTHER_NAME`].
pub const AUTHORITY: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/support/authority.pem");

/// A server on loopback with this certificate and key. Each connection ends after its handshake.
pub fn tls_server(pem: &[u8]) -> SocketAddr {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(
            vec![CertificateDer::from_pem_slice(pem).unwrap()],
            PrivateKeyDer::from_pem_slice(pem).unwrap(),
        )
        .unwrap();
    let config = Arc::new(config);
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let mut connection = rustls::ServerConnection::new(config.clone()).unwrap();
            // The client hangs up: that is the test.
            let _ = connection.complete_io(&mut stream.unwrap());
        }
    });
    address
}
