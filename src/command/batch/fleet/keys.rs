//! Which request a record is of, told by its key. Pure.
//!
//! Workers give whatever becomes of a request its key: captions, dead letters, and those dead letters that had no room for
//! the request itself. A key names the job and the row, so that an answer is recognised whichever run of the job sent the
//! request, and nobody else's is. It names the try, too: a late failure of an earlier one is no answer to this one.

/// The keys of a job's requests.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Keys {
    /// What all of them begin with.
    prefix: String,
    /// How often failed rows were opened again.
    round: u32,
}

/// One request of the job. Of one row, later ones are greater.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Sent {
    pub row: u64,
    pub round: u32,
    /// Within the round, from 1; a run that goes on begins anew.
    pub tries: u32,
}

impl Keys {
    /// Of the job of this id, in this round.
    pub fn new(job: &str, round: u32) -> Self {
        Self { prefix: format!("batch-{job}-"), round }
    }

    /// The request of this try of a row, in this round.
    pub fn sent(&self, row: u64, tries: u32) -> Sent {
        Sent { row, round: self.round, tries }
    }

    /// The key of a request, which is its id, too.
    pub fn key(&self, sent: Sent) -> String {
        format!("{}{}-{}-{}", self.prefix, sent.row, sent.round, sent.tries)
    }

    /// The request that has this key, if it is one of this job.
    pub fn read(&self, key: &[u8]) -> Option<Sent> {
        let numbers = std::str::from_utf8(key).ok()?.strip_prefix(&self.prefix)?;
        let mut numbers = numbers.split('-');
        let row = numbers.next()?.parse().ok()?;
        let (round, tries) = (numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?);
        numbers.next().is_none().then_some(Sent { row, round, tries })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn keys_of_other_jobs_and_of_strangers_are_none_of_ours() {
        let keys = Keys::new("00ff", 2);
        assert_eq!(keys.key(keys.sent(17, 1)), "batch-00ff-17-2-1");
        assert_eq!(Keys::new("00ff", 5).read(b"batch-00ff-17-2-1"), Some(keys.sent(17, 1)), "of an earlier round");
        for other in ["", "17-2-1", "batch-00fe-17-2-1", "batch-00ff-17-2", "batch-00ff-17-2-1-1", "batch-00ff-x-2-1"] {
            assert_eq!(keys.read(other.as_bytes()), None, "{other}");
        }
        assert_eq!(keys.read(b"batch-00ff-\xff-2-1"), None);
    }

    proptest! {
        #[test]
        fn a_key_is_read_as_it_was_written_and_later_requests_of_a_row_are_greater(
            row: u64, round: u32, tries in 0..u32::MAX
        ) {
            let keys = Keys::new("1a2b", round);
            let sent = keys.sent(row, tries);
            prop_assert_eq!(keys.read(keys.key(sent).as_bytes()), Some(sent));
            prop_assert!(keys.sent(row, tries + 1) > sent);
            prop_assert!(round == u32::MAX || Keys::new("1a2b", round + 1).sent(row, 1) > sent);
        }
    }
}
