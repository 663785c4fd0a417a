//! The stubs, executed in this process in front of functions that the tests make.

mod accounting;
mod fakes;
mod format;
mod registers;
mod rig;
mod sampling;
mod set;
mod shards;
mod signals;
mod sites;
mod speed;
mod threads;
mod walks;
mod ways;
