use super::*;
use crate::message::ImageRef;
use crate::pipeline::Budget;
use crate::stage::failed;

/// An endpoint whose flow is the test: where rows arrive, and where their ends go.
fn endpoint() -> (Endpoint, Receiver<Tracked<Row>>, Sender<Finished>) {
    let (rows, arriving) = async_channel::bounded(8);
    let (ends, finished) = async_channel::bounded(8);
    let entrance = Entrance { rows, finished, fetching: tokio::spawn(async {}) };
    let part = Budget::new(&settings::Flow::default()).with_endpoint(1.0).endpoint.unwrap();
    let (endpoint, _) = Endpoint::start(entrance, part, settings::Endpoint::default(), Arc::new(Metrics::new()));
    (endpoint, arriving, ends)
}

#[tokio::test(start_paused = true)]
async fn answers_that_came_are_kept_where_another_does_not_come_in_time() {
    let (endpoint, arriving, ends) = endpoint();
    let request = Request::of(ImageRef::parse("http://h.example/a.png").unwrap());
    let admitted = endpoint.admit(Some(10)).unwrap();
    let asked = {
        let endpoint = endpoint.clone();
        tokio::spawn(
            async move { endpoint.ask(admitted, Message::empty("", 0, 0), vec![request.clone(), request]).await },
        )
    };
    let (hangs, fails) = (arriving.recv().await.unwrap(), arriving.recv().await.unwrap());
    let gone = || Failure::with_message(Stage::Fetch, Code::NotFound, "gone".into());
    ends.send(failed(fails, gone())).await.unwrap();
    let codes: Vec<_> = asked.await.unwrap().unwrap().into_iter().map(|answer| answer.unwrap_err().code).collect();
    assert_eq!(codes, [Code::Deadline, Code::NotFound]);
    assert_eq!(endpoint.in_flight(), 1, "a row keeps its place until it ends");
    ends.send(failed(hangs, gone())).await.unwrap();
    while endpoint.in_flight() > 0 {
        tokio::task::yield_now().await;
    }
    assert!(endpoint.take_lost().is_none());
}

#[test]
fn requests_at_the_same_time_have_a_number_each() {
    let numbers = Numbers::new();
    let take = || {
        for _ in 0..20_000 {
            let (_, ticket) = numbers.next().expect("a number without a ticket");
            ticket.resolve(Outcome::Published);
        }
    };
    std::thread::scope(|scope| (0..4).for_each(|_| drop(scope.spawn(take))));
    assert_eq!(numbers.next().unwrap().0, 80_000);
    assert!(numbers.ledger.take_lost().is_some(), "the ticket that was dropped just now, and no other");
    assert!(numbers.ledger.take_lost().is_none());
}
