//! What changed, and where to look: the eBPF agent, the VMA model, the dirty sources, epochs, the watch session.

pub mod agent;
pub mod control;
pub mod dirty;
pub mod epoch;
pub mod model;
pub mod session;
pub mod uffd;
