//! A TCP proxy between a worker and a broker, with weather: it passes, delays, holds or cuts what goes through it.
//!
//! Bytes are never lost or changed on a connection that lives on, as TCP has it: what is held arrives when the weather
//! clears. It sees where Kafka's requests begin, so that those of one kind can be held and the others pass.

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until};

/// The requests of a transaction, by their numbers in the protocol: InitProducerId, AddPartitionsToTxn,
/// AddOffsetsToTxn, EndTxn, TxnOffsetCommit.
pub const TRANSACTION_REQUESTS: &[i16] = &[22, 24, 25, 26, 28];
/// The request that commits or aborts.
pub const END_OF_TRANSACTION: &[i16] = &[26];

/// Largest request that is passed on; a longer one is no request.
const MAX_REQUEST: usize = 64 << 20;
/// Pieces on their way in one direction of a connection.
const ON_THE_WAY: usize = 256;

/// What the network does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Weather {
    Clear,
    /// Everything arrives this much later, either way.
    Delayed(Duration),
    /// Nothing arrives at the brokers, at the worker, or at either. Later it does.
    Held {
        to_broker: bool,
        to_worker: bool,
    },
    /// Requests of these kinds, and what follows them on their connection, do not arrive. Later they do.
    RequestsHeld(&'static [i16]),
    /// The brokers get such requests, and the worker gets no answer. Later it does.
    AnswersHeld(&'static [i16]),
    /// Connections are closed, and no new one is made.
    Down,
}

/// The way of one worker to all brokers: a proxy for each of them.
pub struct Link {
    ports: Vec<u16>,
    shared: Arc<Shared>,
    _listeners: JoinSet<()>,
}

struct Shared {
    weather: watch::Sender<Weather>,
    /// Where the brokers listen, once they do.
    brokers: OnceLock<Vec<u16>>,
    /// Pieces that were held or delayed, and connections that were closed.
    touched: AtomicU64,
}

impl Link {
    /// Opens `brokers` ports.
    pub async fn open(brokers: usize) -> Self {
        let shared = Arc::new(Shared {
            weather: watch::Sender::new(Weather::Clear),
            brokers: OnceLock::new(),
            touched: AtomicU64::new(0),
        });
        let (mut ports, mut listeners) = (Vec::new(), JoinSet::new());
        for index in 0..brokers {
            let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
            ports.push(listener.local_addr().unwrap().port());
            listeners.spawn(listen(listener, index, shared.clone()));
        }
        Self { ports, shared, _listeners: listeners }
    }

    /// The port that stands for each broker.
    pub fn ports(&self) -> &[u16] {
        &self.ports
    }

    /// Says where the brokers listen.
    pub fn connect(&self, brokers: Vec<u16>) {
        self.shared.brokers.set(brokers).expect("one set of brokers");
    }

    /// Changes the weather, for the connections that there are and for new ones.
    pub fn set(&self, weather: Weather) {
        self.shared.weather.send_replace(weather);
    }

    /// Pieces that were held or delayed, and connections that were closed, since the start.
    pub fn touched(&self) -> u64 {
        self.shared.touched.load(Ordering::Relaxed)
    }
}

impl Shared {
    fn touch(&self) {
        self.touched.fetch_add(1, Ordering::Relaxed);
    }
}

async fn listen(listener: TcpListener, index: usize, shared: Arc<Shared>) {
    let mut connections = JoinSet::new();
    while let Ok((worker, _)) = listener.accept().await {
        let Some(port) = shared.brokers.get().map(|brokers| brokers[index]) else { continue };
        if *shared.weather.borrow() == Weather::Down {
            shared.touch();
            continue;
        }
        let shared = shared.clone();
        connections.spawn(async move {
            let mut weather = shared.weather.subscribe();
            tokio::select! {
                () = pass(worker, port, &shared) => {}
                _ = weather.wait_for(|weather| *weather == Weather::Down) => shared.touch(),
            }
        });
        // Those that have ended need no place.
        while connections.try_join_next().is_some() {}
    }
}

/// Passes a connection on until one side closes it.
async fn pass(worker: TcpStream, port: u16, shared: &Arc<Shared>) {
    // A broker that is down refuses, and so does the proxy, by closing.
    let Ok(broker) = TcpStream::connect(SocketAddr::from((Ipv4Addr::LOCALHOST, port))).await else { return };
    let _ = (worker.set_nodelay(true), broker.set_nodelay(true));
    let ((from_worker, to_worker), (from_broker, to_broker)) = (worker.into_split(), broker.into_split());
    // Whether an answer is to come that is held.
    let marked = Arc::new(AtomicBool::new(false));
    let (requests, sent) = mpsc::channel(ON_THE_WAY);
    let (answers, received) = mpsc::channel(ON_THE_WAY);
    tokio::select! {
        () = read_requests(from_worker, requests) => {}
        () = read_answers(from_broker, answers) => {}
        () = write(to_broker, sent, shared, &marked, true) => {}
        () = write(to_worker, received, shared, &marked, false) => {}
    }
}

/// Bytes on their way: a whole request with its number, or a part of an answer.
struct Piece {
    read: Instant,
    request: Option<i16>,
    bytes: Vec<u8>,
}

async fn read_requests(mut from: OwnedReadHalf, to: mpsc::Sender<Piece>) {
    // Length, then the number of the kind.
    while let Ok(length) = from.read_u32().await {
        let size = length as usize;
        assert!((2..=MAX_REQUEST).contains(&size), "a request of {size} bytes");
        let mut bytes = length.to_be_bytes().to_vec();
        bytes.resize(4 + size, 0);
        if from.read_exact(&mut bytes[4..]).await.is_err() {
            return;
        }
        let request = Some(i16::from_be_bytes([bytes[4], bytes[5]]));
        if to.send(Piece { read: Instant::now(), request, bytes }).await.is_err() {
            return;
        }
    }
}

async fn read_answers(mut from: OwnedReadHalf, to: mpsc::Sender<Piece>) {
    loop {
        let mut bytes = vec![0; 64 << 10];
        let Ok(read @ 1..) = from.read(&mut bytes).await else { return };
        bytes.truncate(read);
        if to.send(Piece { read: Instant::now(), request: None, bytes }).await.is_err() {
            return;
        }
    }
}

async fn write(
    mut to: OwnedWriteHalf,
    mut pieces: mpsc::Receiver<Piece>,
    shared: &Shared,
    marked: &AtomicBool,
    to_broker: bool,
) {
    let mut weather = shared.weather.subscribe();
    while let Some(piece) = pieces.recv().await {
        let stays = |weather: &Weather| match weather {
            Weather::Held { to_broker: broker, to_worker: worker } => {
                if to_broker {
                    *broker
                } else {
                    *worker
                }
            }
            Weather::RequestsHeld(kinds) => piece.request.is_some_and(|kind| kinds.contains(&kind)),
            Weather::AnswersHeld(_) => !to_broker && marked.load(Ordering::Acquire),
            _ => false,
        };
        if stays(&weather.borrow_and_update()) {
            shared.touch();
            if weather.wait_for(|weather| !stays(weather)).await.is_err() {
                return;
            }
        }
        let now = *weather.borrow_and_update();
        if let Weather::Delayed(delay) = now {
            shared.touch();
            sleep_until(piece.read + delay).await;
        }
        if let (Weather::AnswersHeld(kinds), Some(request)) = (now, piece.request)
            && kinds.contains(&request)
        {
            marked.store(true, Ordering::Release);
        }
        if !matches!(now, Weather::AnswersHeld(_)) {
            marked.store(false, Ordering::Release);
        }
        if to.write_all(&piece.bytes).await.is_err() {
            return;
        }
    }
}
