use std::io::Write;

use super::*;

fn own_exe() -> File {
    File::open("/proc/self/exe").unwrap()
}

fn file_of(bytes: &[u8]) -> File {
    let mut file = tempfile();
    file.write_all(bytes).unwrap();
    file
}

fn tempfile() -> File {
    use std::os::unix::fs::OpenOptionsExt;
    File::options()
        .read(true)
        .write(true)
        .custom_flags(libc::O_TMPFILE)
        .open(std::env::temp_dir())
        .unwrap()
}

/// Check that what is read of Debian's `/bin/true` or whatever it is here
/// agrees with the object crate: build id and segments.
#[test]
fn agrees_with_object() {
    use object::read::{Object, ObjectSegment};
    for path in ["/bin/true", "/proc/self/exe"] {
        let file = File::open(path).unwrap();
        let layout = ElfLayout::read(&file).unwrap();
        let bytes = std::fs::read(path).unwrap();
        let object = object::File::parse(&*bytes).unwrap();
        let expected = object.build_id().unwrap().map(<[u8]>::to_vec);
        assert_eq!(layout.build_id(&file), expected, "{path}");
        let segments: Vec<_> = object
            .segments()
            .map(|segment| (segment.address(), segment.file_range().0))
            .collect();
        let ours: Vec<_> = layout
            .segments
            .iter()
            .map(|segment| (segment.address.0, segment.file_offset.0))
            .collect();
        assert_eq!(ours, segments, "{path}");
    }
}

/// Check that this function's address comes back as an offset at which the
/// file holds this function's code.
#[test]
fn code_offset_finds_code() {
    let layout = ElfLayout::read(&own_exe()).unwrap();
    let text = layout.segments.iter().find(|s| s.executable).unwrap();
    let last = VirtOffset(text.address.0 + text.file_size - 1);
    assert_eq!(
        layout.code_offset(text.address),
        Some(text.file_offset),
        "first byte"
    );
    assert!(layout.code_offset(last).is_some());
    assert_eq!(layout.code_bytes_from(text.address), text.file_size);
    assert_eq!(layout.code_bytes_from(last), 1);
    assert_eq!(layout.code_bytes_from(VirtOffset(u64::MAX)), 0);
    assert_eq!(layout.code_offset(VirtOffset(u64::MAX)), None);
    let data = layout.segments.iter().find(|s| !s.executable).unwrap();
    assert_eq!(layout.code_offset(data.address), None);
}

/// Check that no file panics or takes long: empty, text, every truncation of
/// a header, and a real file with each byte of its headers set to each of
/// some bad values.
#[test]
fn hostile_files() {
    let mut good = std::fs::read("/bin/true").unwrap();
    good.truncate(8 << 10);
    assert!(matches!(
        ElfLayout::read(&file_of(b"")),
        Err(ElfError::NotElf)
    ));
    assert!(matches!(
        ElfLayout::read(&file_of(&[b'x'; 100])),
        Err(ElfError::NotElf)
    ));
    for length in 0..200 {
        assert!(ElfLayout::read(&file_of(&good[..length])).is_err());
    }
    // Without its section headers the rest of the file must do.
    good[40..48].fill(0);
    let file = file_of(&good);
    assert!(ElfLayout::read(&file).unwrap().build_id(&file).is_some());
    for at in 0..64 + 56 * 14 {
        for bad in [0x00, 0x7f, 0xff] {
            let mut bytes = good.clone();
            bytes[at] = bad;
            let file = file_of(&bytes);
            if let Ok(layout) = ElfLayout::read(&file) {
                let _ = layout.build_id(&file);
                let _ = layout.code_offset(VirtOffset(0x2000));
            }
        }
    }
}
