//! Where a profile goes: opened before anything is recorded, so that a mistake
//! costs nothing.

use std::{
    fs::{self, File},
    io::{self, BufWriter, IsTerminal as _, Write as _},
    path::{Path, PathBuf},
};

use anyhow::Context as _;

use crate::export::{self, Format, profile::Profile, text};

/// An output that can be written.
#[derive(Debug)]
pub(super) struct Output {
    sink: Sink,
}

#[derive(Debug)]
enum Sink {
    Stdout,
    Stderr,
    /// A file that is replaced when the profile is complete: the old one stays
    /// until then.
    Replace {
        partial: PathBuf,
        path: PathBuf,
    },
    /// A device or a pipe: written as it is.
    Special(File),
}

impl Output {
    /// Opens `path`, or with none or `-` the standard output; `stdout_is_taken` is
    /// set where standard output belongs to a command.
    ///
    /// # Errors
    ///
    /// If it cannot be written.
    pub(super) fn open(path: Option<&Path>, stdout_is_taken: bool) -> anyhow::Result<Self> {
        let sink = match path {
            None if stdout_is_taken => Sink::Stderr,
            None => Sink::Stdout,
            Some(path) if path == Path::new("-") => Sink::Stdout,
            Some(path) => {
                open_file(path).with_context(|| format!("cannot write to {}", path.display()))?
            }
        };
        Ok(Self { sink })
    }

    /// Where it is shown to a person: no file was named.
    pub(super) const fn is_standard(&self) -> bool {
        matches!(self.sink, Sink::Stdout | Sink::Stderr)
    }

    /// Whether a person is looking at it.
    fn is_terminal(&self) -> bool {
        match &self.sink {
            Sink::Stdout => io::stdout().is_terminal(),
            Sink::Stderr => io::stderr().is_terminal(),
            Sink::Replace { .. } | Sink::Special(_) => false,
        }
    }

    /// What to call it.
    pub(super) fn name(&self) -> String {
        match &self.sink {
            Sink::Stdout => "standard output".to_owned(),
            Sink::Stderr => "standard error".to_owned(),
            Sink::Special(_) => "the output".to_owned(),
            Sink::Replace { path, .. } => path.display().to_string(),
        }
    }

    /// Writes the profile, all of it or nothing.
    ///
    /// # Errors
    ///
    /// If writing fails; the file that was there before stays.
    pub(super) fn write(self, format: Format, profile: &Profile) -> anyhow::Result<()> {
        let color = self.is_terminal();
        self.write_with(|sink| match format {
            Format::Text if color => {
                let options = text::Options {
                    color,
                    ..text::Options::default()
                };
                text::write(profile, &options, sink)
            }
            _ => export::write(format, profile, sink),
        })
    }

    /// Has `content` written, all of it or nothing.
    ///
    /// # Errors
    ///
    /// As for [`Self::write`].
    pub(super) fn write_with(
        mut self,
        content: impl FnOnce(&mut dyn io::Write) -> io::Result<()>,
    ) -> anyhow::Result<()> {
        let result = match &mut self.sink {
            Sink::Stdout => buffered(content, io::stdout().lock()),
            Sink::Stderr => buffered(content, io::stderr().lock()),
            Sink::Special(file) => buffered(content, file),
            Sink::Replace { partial, path } => File::create(&*partial)
                .and_then(|file| buffered(content, file))
                .and_then(|()| fs::rename(&*partial, &*path)),
        };
        match result {
            // Whoever read us has seen enough (`| head`).
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
            result => result.with_context(|| format!("cannot write {}", self.name())),
        }
    }
}

impl Drop for Output {
    fn drop(&mut self) {
        if let Sink::Replace { partial, .. } = &self.sink {
            // Renamed by now, or of no use.
            let _ = fs::remove_file(partial);
        }
    }
}

fn open_file(path: &Path) -> io::Result<Sink> {
    match fs::metadata(path) {
        Ok(metadata) if metadata.is_dir() => return Err(io::ErrorKind::IsADirectory.into()),
        Ok(metadata) if !metadata.is_file() => {
            return Ok(Sink::Special(File::options().write(true).open(path)?));
        }
        // Must be writable itself, not only its directory.
        Ok(_) => drop(File::options().write(true).open(path)?),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(error),
    }
    // A link is followed: the file it leads to is replaced, not the link.
    let path = fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
    let name = path
        .file_name()
        .ok_or(io::ErrorKind::InvalidInput)?
        .to_string_lossy();
    let partial = path.with_file_name(format!(".{name}.{}.partial", std::process::id()));
    drop(File::create(&partial)?);
    Ok(Sink::Replace { partial, path })
}

fn buffered(
    content: impl FnOnce(&mut dyn io::Write) -> io::Result<()>,
    sink: impl io::Write,
) -> io::Result<()> {
    let mut sink = BufWriter::new(sink);
    content(&mut sink)?;
    sink.flush()
}

/// The format: as asked for; else by the file's name; else text for a person
/// and JSON for a file.
pub(super) fn format_for(asked: Option<Format>, path: Option<&Path>) -> Format {
    asked.unwrap_or_else(|| match path {
        Some(path) if path != Path::new("-") => {
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            match name.rsplit_once('.').map(|(_, extension)| extension) {
                Some("gz" | "pb" | "pprof") => Format::Pprof,
                Some("folded") => Format::Folded,
                Some("txt" | "text") => Format::Text,
                _ => Format::Json,
            }
        }
        _ => Format::Text,
    })
}
