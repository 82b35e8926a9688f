//! Sessions, asked through their sockets.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use memckpt::tracker::control::SessionClient;
use memckpt::tracker::epoch::Epoch;

/// Waits until the session of `pid` is past `epoch`: it follows an exec in its own time, and a checkpoint that it meets there
/// may fail.
///
/// # Errors
///
/// When it does not get there.
pub fn followed(pid: i32, epoch: Epoch) -> Result<()> {
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        if let Ok(Some(mut client)) = SessionClient::connect(pid)
            && client.hello().is_ok_and(|info| info.epoch > epoch)
        {
            return Ok(());
        }
        ensure!(Instant::now() < deadline, "the session does not follow the exec");
        std::thread::sleep(Duration::from_millis(20));
    }
}
