//! The clusters that the other tests stand on.

use std::time::Duration;

use blipstream::kafka::{ReadLimits, read_records, write_records};
use blipstream::settings::Settings;

use crate::support::client::PATIENCE;
use crate::support::flow::request;
use crate::support::kafka::{Cluster, Options};

#[tokio::test(flavor = "multi_thread")]
async fn what_three_nodes_acknowledge_outlives_each_of_them_and_a_listener_tells_only_its_own_addresses() {
    let proxied = [40_001, 40_002, 40_003];
    let advertise = proxied.iter().zip(1..).map(|(port, node)| ("w1".to_owned(), node, *port)).collect();
    let options = Options { nodes: 3, listeners: vec!["w1".into(), "w2".into()], advertise, ..Options::default() };
    let Some(cluster) = Cluster::start(&options) else { return };
    assert_eq!(cluster.listener("w1"), proxied.map(|port| format!("127.0.0.1:{port}")).join(","));
    let ports: Vec<u16> = (1..=3).map(|node| cluster.port("w2", node)).collect();
    let told: Vec<String> = ports.iter().map(|port| format!("127.0.0.1:{port}")).collect();
    assert_eq!(cluster.listener("w2").split(',').collect::<Vec<_>>(), told);

    cluster.create_topics(&["t"], 6).await;
    let mut kafka = Settings::default().kafka;
    cluster.listener("w2").clone_into(&mut kafka.bootstrap_servers);
    let reached = blipstream::kafka::check_topics(&kafka, &[], PATIENCE).unwrap().addresses;
    assert!(reached.iter().all(|address| told.contains(address)), "{reached:?} are not all of {told:?}");

    for round in 0..3 {
        cluster.kill(round + 1);
        write_records(&kafka, "t", (0..100).map(|n| request(n, "x")), PATIENCE).unwrap();
        if round == 1 {
            cluster.suspend(3);
            tokio::time::sleep(Duration::from_millis(200)).await;
            cluster.resume(3);
        }
        cluster.restart(round + 1);
    }
    let mut found = 0;
    let limits = ReadLimits { from: blipstream::kafka::From::Beginning, timeout: PATIENCE, stop_at_end: true };
    read_records(&kafka, "t", limits, |_| {
        found += 1;
        true
    })
    .unwrap();
    assert_eq!(found, 300);
}
