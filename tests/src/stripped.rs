//! Programs without symbols, and what was taken from them.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use object::Object as _;

use crate::{dir::TempDir, targets::Target};

/// A program that was stripped, and its debug file.
#[derive(Debug)]
pub struct Stripped {
    /// The program.
    pub program: PathBuf,
    /// The content of its debug file.
    pub debug: Vec<u8>,
    /// Its build id, in hexadecimal.
    pub build_id: String,
}

impl Stripped {
    /// A stripped copy of a program in a directory.
    #[must_use]
    pub fn new(target: &Target, dir: &TempDir) -> Self {
        let (program, debug) = (dir.path().join("program"), dir.path().join("debug"));
        fs::copy(target.path(), &program).expect("a copy of the program");
        run(Command::new("objcopy")
            .arg("--only-keep-debug")
            .args([&program, &debug]));
        run(Command::new("strip").arg("--strip-all").arg(&program));
        let content = fs::read(&program).expect("the stripped program");
        let object = object::File::parse(&*content).expect("an ELF file");
        let build_id = object.build_id().ok().flatten().expect("a build id");
        let build_id = build_id.iter().map(|byte| format!("{byte:02x}")).collect();
        let content = fs::read(&debug).expect("the debug file");
        fs::remove_file(debug).expect("the debug file is ours");
        Self {
            program,
            debug: content,
            build_id,
        }
    }

    /// The program as text.
    #[must_use]
    pub fn text(&self) -> &str {
        self.program.to_str().expect("a path in UTF-8")
    }

    /// Where a debug file of this build id is below a root.
    #[must_use]
    pub fn place_by_build_id(&self, root: &Path) -> PathBuf {
        let (first, rest) = self.build_id.split_at(2);
        root.join("usr/lib/debug/.build-id")
            .join(first)
            .join(format!("{rest}.debug"))
    }
}

/// Runs a tool.
pub fn run(command: &mut Command) {
    let status = command
        .status()
        .unwrap_or_else(|error| panic!("{command:?}: {error}"));
    assert!(status.success(), "{command:?}: {status}");
}
