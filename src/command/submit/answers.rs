//! Which answers are still missing, and which are whose. Pure.

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::sync::Arc;

use crate::command::collect::answer::Answer;
use crate::message::Origin;

/// Most answers that are kept because their request may not be known yet.
const MAX_EARLY: usize = 10_000;

/// Partition and offset of a request.
type Place = (i32, i64);

/// The requests that were sent and are not answered.
///
/// An answer can come before the broker's word on where its request went: it is kept for as long as any request that
/// was under way when it came is still under way.
#[derive(Debug)]
pub struct Awaited {
    topic: Arc<str>,
    under_way: BTreeSet<u64>,
    open: HashMap<Place, Open>,
    images: usize,
    early: HashMap<Place, Vec<Answer>>,
    /// The newest request under way when an early answer came, and whose the answer is; oldest first.
    expiry: VecDeque<(u64, Place)>,
}

#[derive(Debug)]
struct Open {
    name: Box<str>,
    left: Left,
}

#[derive(Debug)]
enum Left {
    One,
    Rows(BTreeSet<usize>),
}

/// An answer that was waited for, and how many images it answers.
#[derive(Debug, PartialEq)]
pub struct Taken {
    pub answer: Answer,
    pub images: usize,
}

impl Awaited {
    /// Nothing is awaited of requests in `topic`.
    pub fn new(topic: &str) -> Self {
        Self {
            topic: topic.into(),
            under_way: BTreeSet::new(),
            open: HashMap::new(),
            images: 0,
            early: HashMap::new(),
            expiry: VecDeque::new(),
        }
    }

    /// A request goes to the broker. Numbers only rise.
    pub fn sent(&mut self, number: u64) {
        self.under_way.insert(number);
    }

    /// The broker has the request, with so many `rows`, at this place. Returns the answers that were here before.
    pub fn placed(&mut self, number: u64, place: Place, name: &str, rows: usize) -> Vec<Taken> {
        let left = if rows == 1 { Left::One } else { Left::Rows((0..rows).collect()) };
        self.open.insert(place, Open { name: name.into(), left });
        self.images += rows;
        let early = self.early.remove(&place).unwrap_or_default();
        self.settled(number);
        early.into_iter().filter_map(|answer| self.take(answer)).collect()
    }

    /// The request is no longer under way.
    pub fn settled(&mut self, number: u64) {
        self.under_way.remove(&number);
        let oldest = self.under_way.first().copied().unwrap_or(u64::MAX);
        while let Some((_, place)) = self.expiry.front().filter(|(newest, _)| *newest < oldest) {
            self.early.remove(place);
            self.expiry.pop_front();
        }
    }

    /// Takes an answer, unless it is a stranger's or a second one.
    pub fn take(&mut self, answer: Answer) -> Option<Taken> {
        if answer.origin.topic != self.topic {
            return None;
        }
        let place = (answer.origin.partition, answer.origin.offset);
        let Some(open) = self.open.get_mut(&place) else {
            self.keep(place, answer);
            return None;
        };
        let (images, over) = match (&mut open.left, answer.index) {
            (Left::One, _) => (1, true),
            // Dead as a whole: whatever had no answer has one now.
            (Left::Rows(rows), None) => (rows.len(), true),
            (Left::Rows(rows), Some(index)) => (usize::from(rows.remove(&index)), rows.is_empty()),
        };
        if over {
            self.open.remove(&place);
        }
        self.images -= images;
        (images > 0).then_some(Taken { answer, images })
    }

    fn keep(&mut self, place: Place, answer: Answer) {
        if let Some(newest) = self.under_way.last() {
            self.expiry.push_back((*newest, place));
            self.early.entry(place).or_default().push(answer);
        }
    }

    /// Whether no more answers should be taken before more requests have their place.
    pub fn is_crowded(&self) -> bool {
        self.expiry.len() >= MAX_EARLY
    }

    /// Images without an answer.
    pub fn images(&self) -> usize {
        self.images
    }

    /// The requests without an answer, in the order of their place: each by name and origin.
    pub fn missing(&self, most: usize) -> Vec<String> {
        let mut places: Vec<_> = self.open.iter().collect();
        places.sort_unstable_by_key(|(place, _)| **place);
        let word = |((partition, offset), open): (&Place, &Open)| {
            let origin = Origin { topic: self.topic.clone(), partition: *partition, offset: *offset, index: None };
            match &open.left {
                Left::One => format!("{} ({origin})", open.name),
                Left::Rows(rows) => format!("{} ({origin}, {} images)", open.name, rows.len()),
            }
        };
        places.into_iter().take(most).map(word).collect()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::command::collect::answer::{Captioned, Refusal};

    fn answer(offset: i64, index: Option<usize>) -> Answer {
        let origin = Origin { topic: "requests".into(), partition: 0, offset, index: None };
        let outcome = match index {
            Some(_) => Ok(Captioned { text: "a dog".into(), record: "{}".into() }),
            None => Err(Refusal { code: "dns".into(), stage: "fetch".into(), message: String::new() }),
        };
        Answer { id: String::new(), index, origin, outcome }
    }

    #[test]
    fn a_second_answer_to_one_origin_is_not_taken() {
        let mut awaited = Awaited::new("requests");
        awaited.sent(0);
        assert_eq!(awaited.placed(0, (0, 5), "cat.jpg", 1), []);
        assert_eq!(awaited.missing(9), ["cat.jpg (requests/0/5)"]);
        assert!(awaited.take(answer(5, Some(0))).is_some());
        assert!(awaited.take(answer(5, Some(0))).is_none());
        assert!(awaited.take(answer(5, None)).is_none());
        assert_eq!(awaited.images(), 0);
    }

    #[test]
    fn rows_of_a_table_are_answered_one_by_one_or_together() {
        let mut awaited = Awaited::new("requests");
        awaited.placed(0, (0, 1), "table.json", 3);
        assert_eq!(awaited.take(answer(1, Some(2))).unwrap().images, 1);
        assert!(awaited.take(answer(1, Some(2))).is_none());
        assert!(awaited.take(answer(1, Some(3))).is_none());
        assert_eq!(awaited.missing(9), ["table.json (requests/0/1, 2 images)"]);
        assert_eq!(awaited.take(answer(1, None)).unwrap().images, 2);
        assert!(awaited.take(answer(1, Some(0))).is_none());
        assert_eq!(awaited.images(), 0);
    }

    #[test]
    fn an_answer_before_the_acknowledgement_is_not_lost_and_a_strangers_is_not_kept() {
        let mut awaited = Awaited::new("requests");
        awaited.sent(0);
        awaited.sent(1);
        assert!(awaited.take(answer(7, Some(0))).is_none());
        assert!(awaited.take(answer(1000, Some(0))).is_none());
        awaited.sent(2);
        assert_eq!(awaited.placed(0, (0, 6), "a", 1), []);
        assert_eq!(awaited.placed(1, (0, 7), "b", 1).len(), 1);
        assert!(awaited.early.is_empty() && awaited.expiry.is_empty(), "{awaited:?}");
        assert_eq!((awaited.images(), awaited.under_way.len()), (1, 1));
        let mut elsewhere = answer(6, Some(0));
        elsewhere.origin.topic = "other".into();
        assert!(awaited.take(elsewhere).is_none());
    }

    proptest! {
        #[test]
        fn every_answer_counts_once_whatever_the_order(
            order in Just((0..40usize).collect::<Vec<_>>()).prop_shuffle()
        ) {
            // Twenty requests; even steps acknowledge one, odd steps answer one, in any order.
            let mut awaited = Awaited::new("requests");
            (0..20).for_each(|number| awaited.sent(number));
            let mut taken = Vec::new();
            for step in order {
                let number = step / 2;
                if step % 2 == 0 {
                    taken.extend(awaited.placed(number as u64, (0, number as i64), "x", 1));
                } else {
                    taken.extend(awaited.take(answer(number as i64, Some(0))));
                }
            }
            let origins: BTreeSet<_> = taken.iter().map(|taken| taken.answer.origin.offset).collect();
            prop_assert_eq!((taken.len(), origins.len(), awaited.images()), (20, 20, 0));
        }
    }
}
