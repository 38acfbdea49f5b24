//! One fetch for all who ask for the same address at the same time.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use tokio::sync::watch;

use super::{FailedFetch, FetchError};

/// How a fetch ended, for those who waited for it.
type Landed = Option<Result<Bytes, FailedFetch>>;

/// The fetches under way, by address.
#[derive(Debug, Default)]
pub(super) struct Flights(Arc<Mutex<HashMap<String, watch::Receiver<Landed>>>>);

/// What somebody who asks for an address is to do.
pub(super) enum Turn {
    /// Fetch it, and [land](Flight::land).
    Fly(Flight),
    /// Take what another fetch brought; `None` where that was given up, or told nothing: ask again.
    Share(Option<Result<Bytes, FailedFetch>>),
}

/// A fetch under way. Dropped without having landed, those who wait for it ask again.
pub(super) struct Flight {
    address: String,
    flights: Flights,
    landed: watch::Sender<Landed>,
}

impl Flights {
    /// Waits for the fetch of this address that is under way, or begins one.
    pub(super) async fn join(&self, address: &str) -> Turn {
        let other = {
            let mut flights = self.lock();
            if let Some(other) = flights.get(address) {
                other.clone()
            } else {
                let (landed, other) = watch::channel(None);
                flights.insert(address.to_owned(), other);
                return Turn::Fly(Flight { address: address.to_owned(), flights: Self(self.0.clone()), landed });
            }
        };
        Turn::Share(wait(other).await)
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<String, watch::Receiver<Landed>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

async fn wait(mut other: watch::Receiver<Landed>) -> Landed {
    // Nothing more is told by a fetch that was given up.
    other.wait_for(Option::is_some).await.ok().and_then(|landed| landed.clone())
}

impl Flight {
    /// Tells how it ended. That its own deadline passed, that its message went to another worker or was put off, is nobody else's
    /// affair.
    pub(super) fn land(self, result: Result<Bytes, FailedFetch>) {
        use FetchError::{Deadline, Halted, LeftAlone};
        let own = |failed: &FailedFetch| matches!(failed.error, Halted | Deadline(_) | LeftAlone { .. });
        if !result.as_ref().is_err_and(own) {
            self.landed.send_replace(Some(result));
        }
    }
}

impl Drop for Flight {
    fn drop(&mut self) {
        self.flights.lock().remove(&self.address);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures::FutureExt;

    fn fly(flights: &Flights, address: &str) -> Flight {
        match flights.join(address).now_or_never() {
            Some(Turn::Fly(flight)) => flight,
            _ => panic!("somebody else fetches {address}"),
        }
    }

    fn failed(error: FetchError) -> FailedFetch {
        let (reference, first_failed_at) = (String::new(), jiff::Timestamp::UNIX_EPOCH);
        FailedFetch { reference, error, attempts: 1, first_failed_at }
    }

    #[tokio::test]
    async fn who_asks_for_the_same_address_meanwhile_gets_what_the_first_one_got() {
        let flights = Flights::default();
        for result in [Ok(Bytes::from_static(b"picture")), Err(failed(FetchError::Empty))] {
            let flight = fly(&flights, "a");
            let mut others = [flights.join("a").boxed(), flights.join("a").boxed()];
            assert!(others.iter_mut().all(|other| other.now_or_never().is_none()));
            drop(fly(&flights, "b"));
            flight.land(result.clone());
            for other in others {
                assert!(matches!(other.await, Turn::Share(Some(shared)) if shared == result));
            }
            drop(fly(&flights, "a"));
        }
        assert!(flights.lock().is_empty());
    }

    #[tokio::test]
    async fn a_fetch_that_is_given_up_or_failed_for_its_own_reasons_is_begun_anew_by_another() {
        let flights = Flights::default();
        for own in [None, Some(FetchError::Halted), Some(FetchError::Deadline(None))] {
            let flight = fly(&flights, "a");
            let mut other = flights.join("a").boxed();
            assert!((&mut other).now_or_never().is_none());
            match own {
                Some(error) => flight.land(Err(failed(error))),
                None => drop(flight),
            }
            assert!(matches!(other.await, Turn::Share(None)));
            drop(fly(&flights, "a"));
        }
    }
}
