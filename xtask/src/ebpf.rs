//! `cargo xtask ebpf`: rebuild the BPF object that `cargo build` embeds.

use std::{fs, path::Path};

use anyhow::{Context as _, Result, bail};

use crate::{
    provenance::Provenance,
    run,
    source_hash::{sha256, source_hash},
    toolchain::Toolchain,
};

/// The object, relative to the workspace.
const OBJECT: &str = "memprof-ebpf/prebuilt/memprof.bpf.o";
/// What it was made with.
const PROVENANCE: &str = "memprof-ebpf/prebuilt/PROVENANCE.toml";

/// Rebuilds the object; with `check` compares it with the one that is there
/// instead of replacing it.
///
/// # Errors
///
/// No toolchain, a program that does not build, or with `check` an object that
/// is not what its sources make.
pub(crate) fn ebpf(workspace: &Path, check: bool) -> Result<()> {
    let toolchain = Toolchain::find()?;
    let target = workspace.join("target/ebpf");
    run(toolchain
        .cargo_build(workspace, &target)?
        .args(["--package", "memprof-ebpf"]))?;
    let built = target.join("bpfel-unknown-none/release/memprof-ebpf");
    let object = fs::read(&built).with_context(|| format!("read {}", built.display()))?;
    let provenance = Provenance {
        source_sha256: source_hash(workspace)?,
        object_sha256: sha256(&object),
        compiler: toolchain.compiler,
        llvm: toolchain.llvm,
        linker: toolchain.linker,
    };
    if check {
        return compare(workspace, &provenance);
    }
    let prebuilt = workspace.join(OBJECT);
    fs::create_dir_all(prebuilt.parent().context("no parent")?)?;
    fs::write(&prebuilt, &object).with_context(|| format!("write {}", prebuilt.display()))?;
    fs::write(workspace.join(PROVENANCE), provenance.to_string())?;
    println!(
        "{OBJECT}: {} bytes, {}, {}",
        object.len(),
        provenance.compiler,
        provenance.linker
    );
    Ok(())
}

fn compare(workspace: &Path, new: &Provenance) -> Result<()> {
    let text = fs::read_to_string(workspace.join(PROVENANCE))
        .with_context(|| format!("read {PROVENANCE}"))?;
    let old =
        Provenance::parse(&text).map_err(|key| anyhow::anyhow!("{PROVENANCE} lacks {key}"))?;
    if old.source_sha256 != new.source_sha256 {
        bail!("{OBJECT} is older than its sources: run cargo xtask ebpf");
    }
    let committed = sha256(&fs::read(workspace.join(OBJECT))?);
    if committed != old.object_sha256 {
        bail!("{OBJECT} is not the one that {PROVENANCE} describes: run cargo xtask ebpf");
    }
    let same_tools =
        (&old.compiler, &old.llvm, &old.linker) == (&new.compiler, &new.llvm, &new.linker);
    if !same_tools {
        println!(
            "{OBJECT}: sources agree; bytes not compared, since it was built by\n  \
             {}, LLVM {}, {}\nand here is\n  {}, LLVM {}, {}",
            old.compiler, old.llvm, old.linker, new.compiler, new.llvm, new.linker
        );
        return Ok(());
    }
    if committed != new.object_sha256 {
        bail!("{OBJECT} is not what its sources make with the recorded compiler");
    }
    println!("{OBJECT}: rebuilt, byte for byte the same");
    Ok(())
}
