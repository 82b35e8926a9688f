//! memckpt checkpoints a running Linux process, again and again, at almost no cost to it.
//!
//! eBPF says *where to look*, the kernel's page-table bits say *what changed*, a parasite and pipes carry the pages
//! out, and the images are CRIU's. Data flows one way: [`kernel`] → [`tracker`] → [`plan`] → [`dump`] → [`image`];
//! and back, [`image`] → [`restore`].

pub mod addr;
pub mod dump;
pub mod image;
pub mod kernel;
pub mod plan;
pub mod range_set;
pub mod restore;
pub mod target;
pub mod tracker;
pub mod verify;
