//! At least once: nothing is lost, whoever dies or leaves.

use crate::support::flow::Flow;

#[tokio::test(flavor = "multi_thread")]
async fn starts() {
    let Some(flow) = Flow::on_kafka(3).await else { return };
    flow.write([]);
    assert_eq!(flow.committed(), [None; 3]);
}
