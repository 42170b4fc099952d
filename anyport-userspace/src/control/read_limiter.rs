//! Limits how much of the daemon's time the requests of clients take that may only read.

use std::{future::Future, sync::Arc, time::Instant};

use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore},
    time::sleep,
};

/// How many requests are answered at a time.
const AT_ONCE: usize = 2;
/// After an answer its permit stays taken for so many times as long as the answer took.
const REST: u32 = 3;

/// The permits of all readers together.
#[derive(Clone, Debug)]
pub(super) struct ReadLimiter(Arc<Semaphore>);

impl ReadLimiter {
    pub(super) fn new() -> Self {
        Self(Arc::new(Semaphore::new(AT_ONCE)))
    }

    /// Waits for a permit and answers. Answers take at most a fourth of the time of each permit, however often clients ask.
    pub(super) async fn take<T>(&self, answer: impl Future<Output = T>) -> T {
        // It is never closed.
        let turn = Arc::clone(&self.0).acquire_owned().await.ok();
        let _rest = Rest { turn, began: Instant::now() };
        answer.await
    }
}

/// How fast a client is answered: readers within their limits, others at once.
#[derive(Clone, Debug)]
pub(super) struct Pace(pub(super) Option<ReadLimiter>);

impl Pace {
    /// Answers, or makes a part of an answer, when it is time.
    pub(super) async fn take<T>(&self, answer: impl Future<Output = T>) -> T {
        match &self.0 {
            Some(limiter) => limiter.take(answer).await,
            None => answer.await,
        }
    }
}

/// Returns a permit after its rest, also if the client goes away in the middle of it.
struct Rest {
    turn: Option<OwnedSemaphorePermit>,
    began: Instant,
}

impl Drop for Rest {
    fn drop(&mut self) {
        let (turn, pause) = (self.turn.take(), self.began.elapsed() * REST);
        tokio::spawn(async move {
            sleep(pause).await;
            drop(turn);
        });
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use futures_util::future::join_all;
    use tokio::time::{sleep, timeout};

    use super::{AT_ONCE, REST, ReadLimiter};

    #[tokio::test]
    async fn answers_have_a_part_of_the_time() {
        const ROUNDS: u32 = 4;
        let (read_limiter, each) = (ReadLimiter::new(), Duration::from_millis(10));
        let began = Instant::now();
        let rounds = (0..ROUNDS).flat_map(|_| 0..AT_ONCE);
        join_all(rounds.map(|_| read_limiter.take(async { sleep(each).await }))).await;
        assert!(began.elapsed() >= each * ((ROUNDS - 1) * (1 + REST) + 1), "{:?}", began.elapsed());
    }

    #[tokio::test]
    async fn who_goes_away_in_the_middle_rests_too() {
        let (read_limiter, each) = (ReadLimiter::new(), Duration::from_millis(20));
        let began = Instant::now();
        join_all((0..AT_ONCE).map(|_| timeout(each, read_limiter.take(sleep(Duration::from_hours(1)))))).await;
        read_limiter.take(async {}).await;
        assert!(began.elapsed() >= each * (1 + REST), "{:?}", began.elapsed());
    }
}
