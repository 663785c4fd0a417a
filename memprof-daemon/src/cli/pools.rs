//! Options that name functions of a program's own pools.

use clap::Args;

use crate::probe::pools::{AllocatingFunction, FreeingFunction, Pools, PoolsError};

/// Functions that are traced beside those of known allocators.
#[derive(Clone, Debug, Default, Args)]
pub(super) struct PoolArgs {
    /// Trace a function that hands out blocks of a program's own pool, by its symbol in any
    /// mapped file; may be repeated. ARG is the number of an argument, from 1 to 6: the bytes
    /// of the block, how many of that size, and where the function stores the block's address,
    /// if it does not return it
    #[arg(
        long = "function",
        value_name = "NAME:size=ARG[,count=ARG][,return|,out=ARG]",
        value_delimiter = ' ',
        env = "MEMPROF_FUNCTION"
    )]
    functions: Vec<AllocatingFunction>,

    /// Trace the function that such blocks are given up by: ARG is the block; may be repeated
    #[arg(
        long = "free-function",
        value_name = "NAME:ptr=ARG",
        value_delimiter = ' ',
        env = "MEMPROF_FREE_FUNCTION"
    )]
    free_functions: Vec<FreeingFunction>,
}

impl PoolArgs {
    /// # Errors
    ///
    /// They make no sense together.
    pub(super) fn pools(&self) -> Result<Pools, PoolsError> {
        Pools::new(self.functions.clone(), self.free_functions.clone())
    }
}
