//! What is known of a device.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// What a device has done, read by metrics and status.
#[derive(Debug)]
pub struct DeviceStats {
    /// Name, e.g. `cpu` or `cuda:0`, with `#n` where a device has several replicas.
    pub name: String,
    /// The kernels it runs on, e.g. `native avx2`.
    pub backend: String,
    /// Images it takes at once.
    pub batch_size: AtomicUsize,
    /// The most that `batch_size` may be, see [`super::most_rows`].
    max_batch_size: AtomicUsize,
    /// Whether its thread is at work.
    pub alive: AtomicBool,
    /// Whether its thread has ended by a failure: it was taken out.
    pub broken: AtomicBool,
    work: Mutex<Work>,
}

#[derive(Debug, Default)]
struct Work {
    done: Duration,
    /// When the batch began that is under way.
    since: Option<Instant>,
}

impl DeviceStats {
    /// Of a device that is about to start.
    pub(super) fn new(name: String, backend: String, batch_size: usize, max_batch_size: usize) -> Self {
        Self {
            name,
            backend,
            batch_size: AtomicUsize::new(batch_size),
            max_batch_size: AtomicUsize::new(max_batch_size),
            alive: AtomicBool::new(true),
            broken: AtomicBool::new(false),
            work: Mutex::default(),
        }
    }

    /// Changes how many images it takes at once, as far as its memory allows.
    pub fn set_batch_size(&self, size: usize) {
        self.batch_size.store(size.clamp(1, self.max_batch_size()), Ordering::Relaxed);
    }

    /// The most images that it may take at once, since the memory of a batch is bounded (`model.max_state`).
    pub fn max_batch_size(&self) -> usize {
        self.max_batch_size.load(Ordering::Relaxed)
    }

    /// Of another model.
    pub(super) fn set_max_batch_size(&self, most: usize) {
        self.max_batch_size.store(most, Ordering::Relaxed);
        self.set_batch_size(self.batch_size.load(Ordering::Relaxed));
    }

    /// Whether its thread is at work.
    pub fn is_sound(&self) -> bool {
        self.alive.load(Ordering::Acquire)
    }

    /// Time at work since the start, the batch under way included.
    pub fn busy(&self) -> Duration {
        let work = self.work();
        work.done + work.since.map_or(Duration::ZERO, |since| since.elapsed())
    }

    fn work(&self) -> MutexGuard<'_, Work> {
        self.work.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn begin(&self) {
        self.work().since = Some(Instant::now());
    }

    pub(super) fn end(&self) {
        let mut work = self.work();
        if let Some(since) = work.since.take() {
            work.done += since.elapsed();
        }
    }
}

/// Notes the end of a device's thread, however it ends.
pub(super) struct Life {
    stats: Arc<DeviceStats>,
    sound: bool,
}

impl Life {
    pub(super) fn of(stats: Arc<DeviceStats>) -> Self {
        Self { stats, sound: false }
    }

    /// The thread has ended as it should, or because of a failure. A panic never gets here, and counts as a failure.
    pub(super) fn over<E>(mut self, result: Result<(), E>) -> Result<(), E> {
        self.sound = result.is_ok();
        result
    }
}

impl Drop for Life {
    fn drop(&mut self) {
        self.stats.broken.store(!self.sound, Ordering::Release);
        self.stats.alive.store(false, Ordering::Release);
    }
}
