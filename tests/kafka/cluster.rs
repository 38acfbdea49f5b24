//! The clusters that the other tests stand on.

use blipstream::kafka::{From, ReadLimits, TopicCheck, check_topics, read_records, write_records};
use blipstream::settings::Settings;

use crate::support::client::PATIENCE;
use crate::support::flow::request;
use crate::support::kafka::{Cluster, Options};

#[tokio::test(flavor = "multi_thread")]
async fn what_three_nodes_acknowledge_outlives_one_of_them_and_a_listener_tells_only_its_own_addresses() {
    let proxied = [40_001, 40_002, 40_003];
    let advertise = proxied.iter().zip(1..).map(|(port, node)| ("w1".to_owned(), node, *port)).collect();
    let options = Options { nodes: 3, listeners: vec!["w1".into(), "w2".into()], advertise, ..Options::default() };
    let Some(cluster) = Cluster::start(&options) else { return };
    assert_eq!(cluster.listener("w1"), proxied.map(|port| format!("127.0.0.1:{port}")).join(","));
    let ports: Vec<u16> = (1..=3).map(|node| cluster.port("w2", node)).collect();
    let mut told: Vec<String> = ports.iter().map(|port| format!("127.0.0.1:{port}")).collect();
    assert_eq!(cluster.listener("w2").split(',').collect::<Vec<_>>(), told);

    cluster.create_topics(&["t"], 6).await;
    let mut kafka = Settings::default().kafka;
    cluster.listener("w2").clone_into(&mut kafka.bootstrap_servers);
    let topic = TopicCheck { topic: "t".into(), setting: "the topic" };
    let mut reached = check_topics(&kafka, &[topic], PATIENCE).unwrap().addresses;
    reached.sort();
    told.sort();
    assert_eq!(reached, told);

    let status = || cluster.run(&["status"]).lines().map(str::to_owned).collect::<Vec<_>>();
    cluster.suspend(2);
    assert!(status()[1].starts_with("node 2: runs, but does not answer"), "{:?}", status());
    cluster.resume(2);

    // Whichever partitions they lead and whoever is the controller: two of three are enough.
    let write = || write_records(&kafka, "t", (0..100).map(|n| request(n, "x")), PATIENCE).unwrap();
    write();
    cluster.kill(1);
    assert_eq!(status()[0], "node 1: down");
    write();
    cluster.restart(1);
    assert!(status().iter().all(|line| line.contains(": answers")), "{:?}", status());
    let mut found = 0;
    let limits = ReadLimits { from: From::Beginning, timeout: PATIENCE, stop_at_end: true };
    read_records(&kafka, "t", limits, |_| {
        found += 1;
        true
    })
    .unwrap();
    assert_eq!(found, 200);
}
