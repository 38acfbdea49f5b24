//! Clients of the endpoint, for `blipstream bench pipeline`: each asks for one caption after another while the stream runs.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::Context;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::Serialize;
use serde_json::json;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

/// The longest answer to one image, in bytes.
const LONGEST_ANSWER: usize = 64 << 10;

/// What the clients saw between two moments.
#[derive(Debug, Serialize)]
pub(super) struct Answered {
    pub(super) clients: usize,
    pub(super) images: usize,
    pub(super) images_per_second: f64,
    /// Of all images that were captioned meanwhile, those of the stream among them.
    pub(super) share: f64,
    /// `endpoint.share`.
    pub(super) configured_share: f64,
    /// From asking to the answer, the sending of the image included.
    pub(super) p50_ms: f64,
    pub(super) p99_ms: f64,
    pub(super) most_ms: f64,
}

/// When an answer came, and how long it took.
type Answers = Arc<Mutex<Vec<(Instant, Duration)>>>;

/// Clients at work.
pub(super) struct Clients {
    count: usize,
    tasks: JoinSet<anyhow::Result<()>>,
    answers: Answers,
    over: CancellationToken,
}

impl Clients {
    /// Starts so many, each with one image a request.
    ///
    /// # Errors
    /// There is no HTTP client to be had.
    pub(super) fn start(count: usize, address: SocketAddr, jpegs: &[bytes::Bytes]) -> anyhow::Result<Self> {
        let (answers, over, mut tasks) = (Answers::default(), CancellationToken::new(), JoinSet::new());
        let bodies: Arc<[String]> =
            jpegs.iter().map(|jpeg| json!({"image": STANDARD.encode(jpeg)}).to_string()).collect();
        for number in 0..count {
            let client = reqwest::Client::builder().no_proxy().build().context("there is no HTTP client to be had")?;
            let (bodies, answers, over) = (bodies.clone(), answers.clone(), over.clone());
            tasks.spawn(async move {
                for body in bodies.iter().cycle().skip(number) {
                    if over.is_cancelled() {
                        break;
                    }
                    let begun = Instant::now();
                    let request = client.post(format!("http://{address}/score")).body(body.clone());
                    let reply = request.header("content-type", "application/json").send().await?;
                    let (status, reply) = (reply.status(), axum::body::Body::new(reqwest::Body::from(reply)));
                    let text = axum::body::to_bytes(reply, LONGEST_ANSWER).await?;
                    let text = String::from_utf8_lossy(&text);
                    // What is refused in the end of the worker is no failure of the measurement.
                    anyhow::ensure!(over.is_cancelled() || text.contains("\"text\""), "/score: {status}: {text}");
                    let mut answers = answers.lock().unwrap_or_else(PoisonError::into_inner);
                    answers.push((Instant::now(), begun.elapsed()));
                }
                Ok(())
            });
        }
        Ok(Self { count, tasks, answers, over })
    }

    /// Stops them. What they were answered between the two moments, in which the stream had so many captions.
    ///
    /// # Errors
    /// One was refused, or none was answered in time.
    pub(super) async fn stop(
        mut self,
        [from, to]: [Instant; 2],
        stream: u64,
        configured_share: f64,
    ) -> anyhow::Result<Answered> {
        self.over.cancel();
        while let Some(ended) = self.tasks.join_next().await {
            ended.context("a client panicked")??;
        }
        let answers = self.answers.lock().unwrap_or_else(PoisonError::into_inner);
        let within = answers.iter().filter(|(at, _)| (from..=to).contains(at));
        let mut ms: Vec<f64> = within.map(|(_, took)| took.as_secs_f64() * 1e3).collect();
        ms.sort_by(f64::total_cmp);
        anyhow::ensure!(!ms.is_empty(), "no client was answered while it was measured; see --time");
        Ok(Answered {
            clients: self.count,
            images: ms.len(),
            images_per_second: ms.len() as f64 / (to - from).as_secs_f64(),
            share: ms.len() as f64 / (ms.len() as f64 + stream as f64),
            configured_share,
            p50_ms: percentile(&ms, 0.5),
            p99_ms: percentile(&ms, 0.99),
            most_ms: percentile(&ms, 1.0),
        })
    }
}

/// The least of sorted numbers that so large a part of them does not exceed.
fn percentile(sorted: &[f64], part: f64) -> f64 {
    sorted[((sorted.len() as f64 * part).ceil() as usize).clamp(1, sorted.len()) - 1]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_percentile_is_the_number_that_so_many_do_not_exceed() {
        let numbers: Vec<f64> = (1..=200).map(f64::from).collect();
        assert_eq!([0.5, 0.99, 1.0].map(|part| percentile(&numbers, part) as u64), [100, 198, 200]);
        assert_eq!(percentile(&[7.0], 0.99) as u64, 7);
    }
}
