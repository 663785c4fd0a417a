//! Profiles written to a directory, again and again.

use std::{
    fs,
    io::{self, Write as _},
    path::{Path, PathBuf},
    time::Duration,
};

use tracing::{info, warn};

use super::service::Service;
use crate::export::{self, Format, profile::Profile};

/// Where, how often and how.
#[derive(Clone, Debug)]
pub struct DumpOptions {
    /// Time from one profile to the next.
    pub every: Duration,
    /// The directory; `-` for standard output.
    pub dir: PathBuf,
    /// How many files to keep, the newest; none for all.
    pub keep: Option<usize>,
    /// In which format.
    pub format: Format,
}

impl DumpOptions {
    /// Tries the directory, before anything is traced.
    ///
    /// # Errors
    ///
    /// If no file can be made in it.
    pub fn require_writable(&self) -> io::Result<()> {
        if self.dir == Path::new("-") {
            return Ok(());
        }
        let path = self
            .dir
            .join(format!(".{PREFIX}{}.partial", std::process::id()));
        fs::File::create(&path)
            .and_then(|_| fs::remove_file(&path))
            .map_err(|error| {
                io::Error::new(
                    error.kind(),
                    format!("cannot write to {}: {error}", self.dir.display()),
                )
            })
    }
}

/// File names are `memprof-SECONDS.MILLISECONDS.EXTENSION`, time since the
/// epoch: they sort by age.
const PREFIX: &str = "memprof-";

/// Writes a profile each time the interval has passed, until cancelled. What
/// fails is said and tried again the next time.
pub async fn dump_forever(service: Service, options: DumpOptions) {
    let mut tick = tokio::time::interval(options.every);
    tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    // The first tick is now, when there is nothing to show yet.
    tick.tick().await;
    loop {
        tick.tick().await;
        dump_once(&service, &options).await;
    }
}

/// Writes one profile. What fails is said.
pub async fn dump_once(service: &Service, options: &DumpOptions) {
    let profile = match service.profile_of(None).await {
        Ok(profile) => profile,
        Err(error) => {
            warn!(%error, "no profile to dump");
            return;
        }
    };
    let options = options.clone();
    let written = tokio::task::spawn_blocking(move || write(&profile, &options)).await;
    match written {
        Ok(Ok(Some(path))) => info!(path = %path.display(), "profile written"),
        Ok(Ok(None)) => {}
        Ok(Err(error)) => warn!(%error, "cannot write a profile; the next will be tried"),
        Err(error) => warn!(%error, "writing a profile failed; the next will be tried"),
    }
}

/// Writes `profile` into the directory and removes the oldest files beyond
/// those to keep. None if it went to standard output.
fn write(profile: &Profile, options: &DumpOptions) -> io::Result<Option<PathBuf>> {
    if options.dir == Path::new("-") {
        let mut out = io::stdout().lock();
        export::write(options.format, profile, &mut out)?;
        out.flush()?;
        return Ok(None);
    }
    let since_epoch = profile
        .captured_at
        .duration_since(std::time::UNIX_EPOCH)
        .unwrap_or_default();
    let extension = options.format.extension();
    let name = format!(
        "{PREFIX}{:010}.{:03}.{extension}",
        since_epoch.as_secs(),
        since_epoch.subsec_millis()
    );
    let path = options.dir.join(&name);
    let partial = options.dir.join(format!(".{name}.partial"));
    let result =
        write_file(profile, options.format, &partial).and_then(|()| fs::rename(&partial, &path));
    if let Err(error) = result {
        // Half a profile on a full disk helps nobody.
        let _ = fs::remove_file(&partial);
        return Err(io::Error::new(
            error.kind(),
            format!("{}: {error}", path.display()),
        ));
    }
    if let Some(keep) = options.keep {
        remove_oldest(&options.dir, extension, keep)?;
    }
    Ok(Some(path))
}

fn write_file(profile: &Profile, format: Format, path: &Path) -> io::Result<()> {
    let mut file = io::BufWriter::new(fs::File::create(path)?);
    export::write(format, profile, &mut file)?;
    file.flush()?;
    // A full disk may show only now.
    file.get_ref().sync_all()
}

/// Whether the name is one that [`write()`] gives: nothing else is ever removed.
fn is_ours(name: &str, extension: &str) -> bool {
    name.strip_prefix(PREFIX)
        .and_then(|rest| rest.strip_suffix(extension))
        .and_then(|rest| rest.strip_suffix('.'))
        .and_then(|time| time.split_once('.'))
        .is_some_and(|(seconds, milliseconds)| {
            let digits = |text: &str| text.bytes().all(|byte| byte.is_ascii_digit());
            seconds.len() >= 10
                && milliseconds.len() == 3
                && digits(seconds)
                && digits(milliseconds)
        })
}

fn remove_oldest(dir: &Path, extension: &str, keep: usize) -> io::Result<()> {
    let mut names: Vec<String> = fs::read_dir(dir)?
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .filter(|name| is_ours(name, extension))
        .collect();
    names.sort_unstable();
    let surplus = names.len().saturating_sub(keep);
    for name in names.iter().take(surplus) {
        fs::remove_file(dir.join(name))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::is_ours;

    /// Check that only files with exactly our form of name would be removed.
    #[test]
    fn only_our_files_are_removed() {
        assert!(is_ours("memprof-1790000000.123.json", "json"));
        assert!(is_ours("memprof-1790000000.123.pb.gz", "pb.gz"));
        for name in [
            "memprof-1790000000.123.jsonx",
            "memprof-1790000000.12.json",
            "memprof-179000000x.123.json",
            "memprof-.json",
            "memprof-1790000000.json",
            "notes.json",
            ".memprof-1790000000.123.json.partial",
        ] {
            assert!(!is_ours(name, "json"), "{name}");
        }
    }
}
