//! The pool against a naive model, and its promises one by one.

use std::future::Future;
use std::pin::Pin;

use futures::FutureExt as _;
use proptest::prelude::*;

use super::*;

type Ask = Pin<Box<dyn Future<Output = Permit>>>;

fn ask(pool: &Pool, bytes: usize) -> Ask {
    let pool = pool.clone();
    Box::pin(async move { pool.acquire(bytes).await })
}

fn pool(items: usize, bytes: usize) -> Pool {
    Pool::new(Limit { items, bytes })
}

fn used(items: usize, bytes: usize) -> Limit {
    Limit { items, bytes }
}

#[test]
fn hands_out_up_to_its_limits_and_gets_everything_back() {
    let pool = pool(2, 100);
    let (a, b) = (pool.try_acquire(60).unwrap(), pool.try_acquire(40).unwrap());
    assert!(pool.try_acquire(0).is_none(), "two items are the limit");
    drop(a);
    assert!(pool.try_acquire(61).is_none(), "a hundred bytes are the limit");
    let c = pool.try_acquire(60).unwrap();
    drop((b, c));
    assert_eq!(pool.used(), Limit::default());
}

#[test]
fn an_over_large_ask_is_admitted_alone() {
    let pool = pool(10, 100);
    let small = pool.try_acquire(1).unwrap();
    let mut large = ask(&pool, usize::MAX);
    assert!((&mut large).now_or_never().is_none());
    drop(small);
    let large = large.now_or_never().unwrap();
    assert!(pool.try_acquire(0).is_none(), "nothing goes beside it");
    drop(large);
    assert_eq!(pool.used(), Limit::default());
}

#[test]
fn a_small_ask_never_overtakes_a_large_one() {
    let pool = pool(10, 100);
    let held = pool.try_acquire(50).unwrap();
    let (mut large, mut small) = (ask(&pool, 80), ask(&pool, 10));
    assert!((&mut large).now_or_never().is_none() && (&mut small).now_or_never().is_none());
    assert!(pool.try_acquire(10).is_none(), "nor does one that does not wait");
    drop(held);
    let large = large.now_or_never().unwrap();
    let small = small.now_or_never().unwrap();
    assert_eq!(pool.used(), used(2, 90));
    drop((large, small));
}

#[test]
fn an_ask_that_is_given_up_frees_those_behind_it_at_once() {
    let pool = pool(10, 100);
    let held = pool.try_acquire(50).unwrap();
    let (mut large, mut small) = (ask(&pool, 80), ask(&pool, 10));
    assert!((&mut large).now_or_never().is_none() && (&mut small).now_or_never().is_none());
    drop(large);
    let small = small.now_or_never().expect("served while the first permit is still held");
    assert!(pool.try_acquire(10).is_some(), "nobody waits any more");
    drop((held, small));
    assert_eq!(pool.used(), Limit::default());
}

#[test]
fn a_permit_granted_to_an_ask_that_was_given_up_comes_back() {
    let pool = pool(1, 100);
    let held = pool.try_acquire(1).unwrap();
    let (mut first, mut second) = (ask(&pool, 1), ask(&pool, 1));
    assert!((&mut first).now_or_never().is_none() && (&mut second).now_or_never().is_none());
    drop(held);
    drop(first);
    drop(second.now_or_never().unwrap());
    assert_eq!(pool.used(), Limit::default());
}

#[test]
fn shrinking_serves_the_next_and_never_grows() {
    let pool = pool(10, 100);
    let mut held = pool.try_acquire(100).unwrap();
    let mut next = ask(&pool, 70);
    assert!((&mut next).now_or_never().is_none());
    held.shrink(1000);
    assert_eq!(held.bytes(), 100);
    held.shrink(30);
    let next = next.now_or_never().unwrap();
    assert_eq!(pool.used(), used(2, 100));
    drop((held, next));
    assert_eq!(pool.used(), Limit::default());
}

#[test]
fn a_higher_limit_serves_at_once_and_a_lower_one_takes_nothing_back() {
    let pool = pool(1, 100);
    let held = pool.try_acquire(10).unwrap();
    let mut next = ask(&pool, 10);
    assert!((&mut next).now_or_never().is_none());
    pool.set_limit(used(2, 100));
    let next = next.now_or_never().unwrap();
    pool.set_limit(used(1, 5));
    assert_eq!((pool.used(), pool.fill()), (used(2, 20), 4.0));
    drop((held, next));
    assert!(pool.try_acquire(5).is_some());
}

#[test]
fn a_limit_of_no_items_still_lets_one_through() {
    assert!(pool(0, 0).try_acquire(5).is_some());
}

#[tokio::test(start_paused = true)]
async fn an_ask_with_a_time_limit_leaves_no_trace_when_it_passes() {
    let pool = pool(1, 100);
    let held = pool.acquire(1).await;
    for _ in 0..100 {
        assert!(tokio::time::timeout(std::time::Duration::from_secs(1), pool.acquire(1)).await.is_err());
    }
    assert_eq!(pool.lock().waiting.len(), 0);
    drop(held);
    assert_eq!(pool.used(), Limit::default());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_tasks_share_the_pool_within_its_limits_and_all_are_served() {
    let pool = pool(4, 100);
    let tasks: Vec<_> = (0..64usize)
        .map(|task| {
            let pool = pool.clone();
            tokio::spawn(async move {
                for round in 0..20 {
                    let mut permit = pool.acquire((task * 7 + round * 13) % 60).await;
                    let now = pool.used();
                    assert!(now.items <= 4 && now.bytes <= 100, "{now:?}");
                    permit.shrink(1);
                    tokio::task::yield_now().await;
                }
            })
        })
        .collect();
    for task in tasks {
        task.await.unwrap();
    }
    assert_eq!(pool.used(), Limit::default());
}

#[derive(Debug, Clone)]
enum Step {
    Ask(usize),
    Try(usize),
    Return(usize),
    Shrink(usize, usize),
    GiveUp(usize),
    Limit(Limit),
}

fn any_step() -> impl Strategy<Value = Step> {
    prop_oneof![
        6 => (0usize..150).prop_map(Step::Ask),
        2 => (0usize..150).prop_map(Step::Try),
        5 => any::<usize>().prop_map(Step::Return),
        2 => (any::<usize>(), 0usize..150).prop_map(|(at, bytes)| Step::Shrink(at, bytes)),
        2 => any::<usize>().prop_map(Step::GiveUp),
        1 => (0usize..6, 0usize..200).prop_map(|(items, bytes)| Step::Limit(Limit { items, bytes })),
    ]
}

/// Asks by number: who holds what, and who waits, in order.
struct Model {
    limit: Limit,
    held: Vec<(usize, usize)>,
    waiting: Vec<(usize, usize)>,
}

impl Model {
    fn used(&self) -> Limit {
        Limit { items: self.held.len(), bytes: self.held.iter().map(|(_, bytes)| bytes).sum() }
    }

    fn fits(&self, bytes: usize) -> bool {
        let used = self.used();
        used.items < self.limit.items.max(1) && (used.items == 0 || used.bytes + bytes <= self.limit.bytes)
    }

    fn serve(&mut self) {
        while self.waiting.first().is_some_and(|(_, bytes)| self.fits(*bytes)) {
            let first = self.waiting.remove(0);
            self.held.push(first);
        }
    }
}

/// The pool and its model, going the same steps.
struct Both {
    pool: Pool,
    model: Model,
    permits: Vec<(usize, Permit)>,
    asks: Vec<(usize, Ask)>,
    asked: usize,
}

impl Both {
    fn step(&mut self, step: &Step) {
        self.asked += 1;
        let who = self.asked;
        match step {
            Step::Ask(bytes) => {
                self.asks.push((who, ask(&self.pool, *bytes)));
                self.model.waiting.push((who, *bytes));
            }
            Step::Try(bytes) => {
                let permit = self.pool.try_acquire(*bytes);
                assert_eq!(permit.is_some(), self.model.waiting.is_empty() && self.model.fits(*bytes));
                if let Some(permit) = permit {
                    self.permits.push((who, permit));
                    self.model.held.push((who, *bytes));
                }
            }
            Step::Return(at) if !self.permits.is_empty() => {
                let (who, _permit) = self.permits.remove(at % self.permits.len());
                self.model.held.retain(|(held, _)| *held != who);
            }
            Step::Shrink(at, bytes) if !self.permits.is_empty() => {
                let at = at % self.permits.len();
                let (who, permit) = &mut self.permits[at];
                permit.shrink(*bytes);
                let held = self.model.held.iter_mut().find(|(held, _)| held == who).unwrap();
                held.1 = held.1.min(*bytes);
            }
            Step::GiveUp(at) if !self.asks.is_empty() => {
                let (who, _ask) = self.asks.remove(at % self.asks.len());
                self.model.waiting.retain(|(waiting, _)| *waiting != who);
            }
            Step::Limit(limit) => {
                self.pool.set_limit(*limit);
                self.model.limit = *limit;
            }
            Step::Return(_) | Step::Shrink(..) | Step::GiveUp(_) => {}
        }
        self.model.serve();
    }

    /// Polls everyone who waits, in order, and compares.
    fn agree(&mut self) {
        for (who, mut ask) in std::mem::take(&mut self.asks) {
            match (&mut ask).now_or_never() {
                Some(permit) => self.permits.push((who, permit)),
                None => self.asks.push((who, ask)),
            }
        }
        let ours: Vec<_> = self.asks.iter().map(|(who, _)| *who).collect();
        let theirs: Vec<_> = self.model.waiting.iter().map(|(who, _)| *who).collect();
        assert_eq!(ours, theirs, "who waits");
        assert_eq!(self.pool.used(), self.model.used());
    }
}

proptest! {
    #[test]
    fn the_pool_agrees_with_a_naive_model_at_every_step(steps in proptest::collection::vec(any_step(), 0..100)) {
        let limit = Limit { items: 3, bytes: 100 };
        let model = Model { limit, held: Vec::new(), waiting: Vec::new() };
        let mut both = Both { pool: Pool::new(limit), model, permits: Vec::new(), asks: Vec::new(), asked: 0 };
        let mut limit_changed = false;
        for step in &steps {
            both.step(step);
            both.agree();
            limit_changed |= matches!(step, Step::Limit(_));
            let used = both.pool.used();
            let within = used.items <= limit.items && (used.bytes <= limit.bytes || used.items == 1);
            prop_assert!(limit_changed || within, "{used:?}");
        }
        while !both.permits.is_empty() {
            both.step(&Step::Return(0));
            both.agree();
        }
        prop_assert!(both.asks.is_empty(), "everyone is served in the end");
        prop_assert_eq!(both.pool.used(), Limit::default());
    }
}
