//! What is known of every row of a job, in eight bytes a row. Pure.

/// What became of a row.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// Nothing yet.
    Open,
    /// It has a caption.
    Captioned,
    /// It failed.
    Failed,
    /// It failed, and is to be tried anew.
    Reopened,
}

/// For each row its state, and where its last result stands in the journal.
#[derive(Debug, Clone, Default)]
pub struct Index {
    /// The offset above, the state in the lowest two bits.
    rows: Vec<u64>,
    captioned: u64,
    failed: u64,
    reopened: u64,
}

impl Index {
    fn state(row: u64) -> State {
        match row & 3 {
            0 => State::Open,
            1 => State::Captioned,
            2 => State::Failed,
            _ => State::Reopened,
        }
    }

    fn count(&mut self, state: State) -> Option<&mut u64> {
        match state {
            State::Open => None,
            State::Captioned => Some(&mut self.captioned),
            State::Failed => Some(&mut self.failed),
            State::Reopened => Some(&mut self.reopened),
        }
    }

    /// A row ended; its result stands at `offset`.
    pub fn set(&mut self, row: u64, offset: u64, state: State) {
        let at = row as usize;
        if at >= self.rows.len() {
            self.rows.resize(at + 1, 0);
        }
        let before = Self::state(self.rows[at]);
        if let Some(count) = self.count(before) {
            *count -= 1;
        }
        if let Some(count) = self.count(state) {
            *count += 1;
        }
        self.rows[at] = offset << 2 | state as u64;
    }

    /// Every failed row is to be tried anew.
    pub fn reopen_failed(&mut self) {
        for row in &mut self.rows {
            if Self::state(*row) == State::Failed {
                *row |= 3;
            }
        }
        self.reopened += std::mem::take(&mut self.failed);
    }

    /// Rows that failed.
    pub fn failed(&self) -> u64 {
        self.failed
    }

    /// Failed rows that are to be tried anew.
    pub fn reopened(&self) -> u64 {
        self.reopened
    }

    /// Rows that need nothing more.
    pub fn done(&self) -> u64 {
        self.captioned + self.failed
    }

    /// One bit for each row: whether it needs nothing more.
    pub fn done_rows(&self) -> Done {
        let mut bits = vec![0u64; self.rows.len().div_ceil(64)];
        for (row, _) in self.rows.iter().enumerate().filter(|(_, row)| matches!(*row & 3, 1 | 2)) {
            bits[row / 64] |= 1 << (row % 64);
        }
        Done(bits)
    }

    /// Where the results stand, in the order of the rows.
    pub fn offsets(&self) -> impl Iterator<Item = u64> {
        self.rows.iter().filter(|row| Self::state(**row) != State::Open).map(|row| row >> 2)
    }
}

/// Which rows need nothing more.
#[derive(Debug, Clone, Default)]
pub struct Done(Vec<u64>);

impl Done {
    /// Whether the row is one of them.
    pub fn has(&self, row: u64) -> bool {
        self.0.get((row / 64) as usize).is_some_and(|bits| bits >> (row % 64) & 1 == 1)
    }
}
