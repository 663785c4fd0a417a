//! Processes: what they map, who they are, when they end.

pub mod content;
pub mod debug_info;
pub mod elf;
pub mod exit;
pub mod files;
pub mod history;
pub mod info;
pub mod mapping;
pub mod maps;
pub mod perf_map;
