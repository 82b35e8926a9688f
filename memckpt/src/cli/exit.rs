//! Exit codes: each has one meaning, documented in `--help`.

use std::process::ExitCode;

use memckpt::dump::DumpError;
use memckpt::restore::RestoreError;
use memckpt::target::FreezeError;

pub(crate) const SUCCESS: u8 = 0;
/// Something failed on the way; the target lives on and the parent is intact.
pub(crate) const FAILURE: u8 = 1;
/// The command line is wrong.
pub(crate) const USAGE: u8 = 2;
/// The target, or a part of it, is something that memckpt does not capture. It was not touched.
pub(crate) const REFUSED: u8 = 3;
/// The parent does not belong to the epoch being tracked: an incremental checkpoint would be wrong.
pub(crate) const EPOCH: u8 = 4;
/// The target did not stop within `--timeout`; it was released.
pub(crate) const TIMEOUT: u8 = 5;
/// An audit found something wrong; no checkpoint was taken.
pub(crate) const AUDIT: u8 = 6;

pub(crate) const HELP: &str = "\
Exit codes:
  0  done
  1  failed on the way; the target lives on, the parent checkpoint is intact; of a restore nothing is left
  2  the command line is wrong
  3  refused: the target holds something that memckpt does not capture; it was not touched. Or a checkpoint holds
     something that cannot be restored here
  4  refused: the parent does not belong to the epoch being tracked
  5  the target did not stop within --timeout; it was released
  6  --audit found something wrong; no checkpoint was taken

Data goes to standard output; logs, progress and errors go to standard error.";

pub(crate) fn of_dump(error: &DumpError) -> ExitCode {
    ExitCode::from(match error {
        DumpError::Refused(_) => REFUSED,
        DumpError::Epoch { .. } => EPOCH,
        DumpError::Freeze(FreezeError::Timeout { .. }) => TIMEOUT,
        DumpError::Audit(_) => AUDIT,
        _ => FAILURE,
    })
}

pub(crate) fn of_restore(error: &RestoreError) -> ExitCode {
    ExitCode::from(match error {
        RestoreError::Refused(_) => REFUSED,
        _ => FAILURE,
    })
}
