//! Processes: what they map, who they are, when they end.

pub mod cgroup;
pub mod content;
pub mod debug_info;
pub mod elf;
pub mod exit;
pub mod files;
pub mod history;
pub mod info;
pub mod mapping;
pub mod maps;
pub mod origin;
pub mod perf_map;
pub(crate) mod state;
