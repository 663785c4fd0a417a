//! A process's Go heap profile, which can be read again and again.

use std::{
    io,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use super::{
    GoError, code,
    memory::{Blocks, Memory, ProcessMemory},
    module::Module,
    pclntab::FunctionTable,
    program::{GoProgram, Variables},
    walk::{Reading, Walk, WalkError},
};

/// A Go program in a process.
#[derive(Debug)]
pub(crate) struct GoSource {
    program: GoProgram,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// None once the process has ended.
    memory: Option<ProcessMemory>,
    module: Option<Module>,
    variables: Option<Variables>,
    walk: Walk,
}

impl GoSource {
    /// Opens the memory of the process that has the program.
    ///
    /// # Errors
    ///
    /// It is gone, or may not be read.
    pub(crate) fn open(pid: u32, program: GoProgram) -> Result<Arc<Self>, GoError> {
        Ok(Arc::new(Self {
            state: Mutex::new(State {
                memory: Some(ProcessMemory::open(pid).map_err(GoError::Memory)?),
                variables: program.variables,
                ..State::default()
            }),
            program,
        }))
    }

    /// The program.
    pub(crate) const fn program(&self) -> &GoProgram {
        &self.program
    }

    /// Where its code is in memory, once that is known.
    pub(super) fn module(&self) -> Option<Module> {
        self.lock().module
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // What a reading that has panicked left is checked by the next.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Reads the profile; none if the program has not begun to run. Takes milliseconds.
    ///
    /// # Errors
    ///
    /// [`GoError`]: there is none, or the process is gone.
    pub(crate) fn read(&self) -> Result<Option<Reading>, GoError> {
        let mut state = self.lock();
        let State {
            memory,
            module,
            variables,
            walk,
        } = &mut *state;
        let Some(memory) = memory else {
            return Err(GoError::Memory(io::ErrorKind::NotFound.into()));
        };
        if module.is_none() {
            let program = &self.program;
            *module = Module::find(
                memory,
                program.layout,
                program.function_table,
                program.data.iter().copied(),
            )?;
        }
        let Some(module) = *module else {
            return Ok(None);
        };
        let known = match *variables {
            Some(known) => known,
            None => *variables.insert(self.find_variables(module)?),
        };
        if let Some(address) = known.is_disabled {
            let mut is_disabled = [0];
            let read = memory.read(address, &mut is_disabled);
            read.map_err(GoError::Memory)?;
            if is_disabled != [0] {
                return Err(GoError::Removed);
            }
        }
        match walk.read(memory, self.program.layout, &known) {
            Ok(reading) => Ok(Some(reading)),
            Err(WalkError::Memory(error)) => Err(GoError::Memory(error)),
            Err(WalkError::Implausible(what)) => {
                // What it knows may be what is wrong.
                *walk = Walk::default();
                Err(GoError::Implausible {
                    version: self.program.version.clone(),
                    what,
                })
            }
        }
    }

    /// Whether no cycle has been published since a reading, and nothing else says that there is
    /// anything new.
    pub(crate) fn is_unchanged(&self, last: &Reading) -> bool {
        let state = self.lock();
        let (Some(memory), Some(variables)) = (&state.memory, &state.variables) else {
            return false;
        };
        last.is_same_cycle(memory, variables).unwrap_or(false)
    }

    /// Lets go of the memory of a process that has ended.
    pub(crate) fn close(&self) {
        self.lock().memory = None;
    }

    /// Its variables, of a program without symbols.
    fn find_variables(&self, module: Module) -> Result<Variables, GoError> {
        let program = &self.program;
        let mut table = FunctionTable::new(
            Blocks::new(&program.image),
            program.layout,
            module,
            program.function_table,
        )?;
        // Those that the linker keeps profiling for, by version.
        let reach = ["runtime.MemProfile", "runtime.memProfileInternal"];
        let mut is_reached = false;
        for name in reach {
            is_reached |= table.has_name(name).map_err(GoError::File)?;
        }
        if !is_reached {
            return Err(GoError::Removed);
        }
        code::find(&mut table)
            .map_err(GoError::File)?
            .ok_or(GoError::NoVariable("runtime.mbuckets"))
    }
}
