//! Waiting for a condition instead of a time.

use std::time::Duration;

use tokio::time::Instant;

const POLL_INTERVAL: Duration = Duration::from_millis(50);

/// Asks until the answer is `Ok`. Panics with `what` and the last answer when that takes longer than `deadline`.
pub async fn wait_until<T, F>(what: &str, deadline: Duration, mut condition: impl FnMut() -> F) -> T
where
    F: Future<Output = Result<T, String>>,
{
    let end = Instant::now() + deadline;
    loop {
        match condition().await {
            Ok(answer) => return answer,
            Err(last) if Instant::now() >= end => {
                panic!("{what}: not within {} s; last seen: {last}", deadline.as_secs_f32())
            }
            Err(_) => tokio::time::sleep(POLL_INTERVAL).await,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn the_first_good_answer_is_taken() {
        let asked = Cell::new(0);
        let answer = wait_until("three", Duration::from_secs(5), || async {
            asked.set(asked.get() + 1);
            if asked.get() == 3 { Ok("three") } else { Err(format!("{}", asked.get())) }
        });
        assert_eq!(answer.await, "three");
    }

    #[tokio::test(start_paused = true)]
    #[should_panic(expected = "never: not within 1 s; last seen: no")]
    async fn a_deadline_shows_the_last_answer() {
        wait_until::<(), _>("never", Duration::from_secs(1), || async { Err("no".into()) }).await;
    }
}
