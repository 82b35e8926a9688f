//! CRIU's protobuf messages, written from their field numbers. Proto2: repeated numbers are not packed.
//!
//! Field names are the schema's, so they carry no documentation of their own.
#![expect(missing_docs, reason = "the fields are named and defined by CRIU's schema")]

mod contents;
mod core;
mod events;
mod files;
mod inventory;
mod mm;
mod pagemap;
mod seccomp;
mod sockets;
mod stats;
mod terminals;
mod x86;

pub use self::contents::*;
pub use self::core::*;
pub use self::events::*;
pub use self::files::*;
pub use self::inventory::*;
pub use self::mm::*;
pub use self::pagemap::*;
pub use self::seccomp::*;
pub use self::sockets::*;
pub use self::stats::*;
pub use self::terminals::*;
pub use self::x86::*;
