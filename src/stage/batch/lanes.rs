//! Items of several lanes, taken in proportion to the lanes' weights, oldest first within a lane. Pure.

use std::collections::VecDeque;

/// Shares are counted in thousandths.
const WHOLE: i64 = 1000;

/// The lanes of the stream, and beside them that of guests, if there is one.
///
/// Guests and the stream take turns in proportion to the guests' share, and the lanes of the stream among each other by
/// their weights: how many of them have items changes nothing for the guests. Who has no items leaves the turn to the others.
#[derive(Debug)]
pub struct Lanes<T> {
    queues: Vec<VecDeque<T>>,
    stream: Turns,
    guests: Option<Guests<T>>,
}

#[derive(Debug)]
struct Guests<T> {
    items: VecDeque<T>,
    /// The stream's turn, and the guests'.
    turns: Turns,
}

impl<T> Lanes<T> {
    /// Empty lanes of these weights, one at least; a weight of 0 counts as 1.
    pub fn new(weights: &[u32]) -> Self {
        let weights = if weights.is_empty() { &[1][..] } else { weights };
        let queues = weights.iter().map(|_| VecDeque::new()).collect();
        Self { queues, stream: Turns::new(weights.iter().map(|weight| i64::from((*weight).max(1)))), guests: None }
    }

    /// With a lane for guests, who get at least this share of the turns while they have items, from 0 to 1: its number is that
    /// behind the last.
    #[must_use]
    pub fn with_guests(mut self, share: f64) -> Self {
        let share = ((share * WHOLE as f64) as i64).clamp(1, WHOLE - 1);
        self.guests = Some(Guests { items: VecDeque::new(), turns: Turns::new([WHOLE - share, share]) });
        self
    }

    /// All items, in no particular order.
    pub(super) fn iter(&self) -> impl Iterator<Item = &T> {
        self.queues.iter().flatten().chain(self.guests.iter().flat_map(|guests| &guests.items))
    }

    /// Items in all lanes.
    pub fn len(&self) -> usize {
        self.stream_len() + self.guests_len()
    }

    /// Items in the lanes of the stream.
    fn stream_len(&self) -> usize {
        self.queues.iter().map(VecDeque::len).sum()
    }

    fn guests_len(&self) -> usize {
        self.guests.as_ref().map_or(0, |guests| guests.items.len())
    }

    /// Items that share their room with those of a lane: all of the stream, or all guests.
    pub(super) fn len_beside(&self, lane: usize) -> usize {
        if self.is_of_guests(lane) { self.guests_len() } else { self.stream_len() }
    }

    /// Whether a lane is that of the guests.
    pub(super) fn is_of_guests(&self, lane: usize) -> bool {
        self.guests.is_some() && lane >= self.queues.len()
    }

    /// Whether all lanes are empty.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The lane of a number; an unknown one is the last.
    fn lane(&mut self, lane: usize) -> &mut VecDeque<T> {
        match &mut self.guests {
            Some(guests) if lane >= self.queues.len() => &mut guests.items,
            _ => {
                let last = self.queues.len() - 1;
                &mut self.queues[lane.min(last)]
            }
        }
    }

    /// Puts an item at the end of a lane.
    pub fn push(&mut self, lane: usize, item: T) {
        self.lane(lane).push_back(item);
    }

    /// Puts an item back at the front of a lane.
    pub fn put_back(&mut self, lane: usize, item: T) {
        self.lane(lane).push_front(item);
    }

    /// The item whose turn it is.
    pub fn pop(&mut self) -> Option<T> {
        let stream = self.stream_len() > 0;
        if let Some(Guests { items, turns }) = &mut self.guests
            && turns.next(|index| if index == 0 { stream } else { !items.is_empty() }) == Some(1)
        {
            return items.pop_front();
        }
        let lane = self.stream.next(|lane| !self.queues[lane].is_empty())?;
        self.queues[lane].pop_front()
    }
}

/// Whose turn it is among several: smooth weighted round-robin, as nginx balances upstreams. Before each pick everybody who
/// has items earns their weight, the richest is picked and pays the sum. A backlog of one thus never starves another.
#[derive(Debug)]
struct Turns {
    /// Weight and credit of each.
    members: Vec<(i64, i64)>,
}

impl Turns {
    fn new(weights: impl IntoIterator<Item = i64>) -> Self {
        Self { members: weights.into_iter().map(|weight| (weight, 0)).collect() }
    }

    /// The next among those that have items; the first of equals.
    fn next(&mut self, has_items: impl Fn(usize) -> bool) -> Option<usize> {
        let (mut total, mut richest) = (0, None::<(usize, i64)>);
        for (index, (weight, credit)) in self.members.iter_mut().enumerate() {
            if !has_items(index) {
                // Who is idle saves nothing up, or it would flood the devices when it wakes.
                *credit = 0;
                continue;
            }
            *credit += *weight;
            total += *weight;
            if richest.is_none_or(|(_, most)| *credit > most) {
                richest = Some((index, *credit));
            }
        }
        let (index, _) = richest?;
        self.members[index].1 -= total;
        Some(index)
    }
}
