//! The image as bytes.

use iced_x86::{Code, Decoder, DecoderOptions, Instruction, InstructionInfoFactory, Register};
use memprof_common::{function::Function, prefilter::SiteKind};

use super::{
    fakes,
    rig::{GEOMETRY, Rig},
};
use crate::prefilter::{
    image::{ImageError, assemble, code_bytes, read_header},
    layout::Geometry,
    stubs,
};

/// Check that the header tells all that is needed to take the image out again, that the
/// image is whole pages and within its bound, and that each kind of site is there.
#[test]
fn the_header_tells_of_the_image() {
    let rig = Rig::new(&fakes::all());
    let image = &rig.image;
    let header = read_header(&image.bytes).unwrap();
    assert_eq!(header.patches, image.patches);
    assert_eq!(header.patches.len(), Function::ALL.len());
    assert_eq!(header.geometry, GEOMETRY);
    assert_eq!(
        header.code.end - header.code.start,
        image.bytes.len() as u64
    );
    assert_eq!(
        header.data.end - header.data.start,
        (GEOMETRY.shared_bytes() + GEOMETRY.private_bytes()) as u64
    );
    assert_eq!(image.bytes.len() % 4096, 0);
    assert!(image.bytes.len() <= code_bytes(Function::ALL.len()));
    for &kind in SiteKind::ALL {
        let sites = image.sites.iter().filter(|&&(k, _)| k == kind).count();
        assert_eq!(sites, 1, "{kind:?}");
    }
    for patch in &header.patches {
        assert_eq!(patch.original[..4], [0x55, 0x48, 0x89, 0xe5]);
        let distance = i32::from_le_bytes(patch.jump[1..].try_into().unwrap());
        let target = patch.address.wrapping_add_signed(5 + i64::from(distance));
        assert_eq!(patch.jump[0], 0xe9);
        assert!(header.code.contains(&target));
    }
}

/// Check that bytes that are no header of ours, cut ones and those of a later version are
/// refused, whatever byte of a good one is changed.
#[test]
fn other_headers_are_refused() {
    let rig = Rig::new(&fakes::all());
    let good = &rig.image.bytes;
    assert!(matches!(read_header(&[]), Err(ImageError::NotAnImage)));
    assert!(matches!(
        read_header(&good[..300]),
        Err(ImageError::NotAnImage)
    ));
    let mut later = good.clone();
    later[8] = 3;
    assert!(matches!(read_header(&later), Err(ImageError::Version(3))));
    for at in 0..56 {
        for value in [0, 1, 0x7f, 0xff] {
            let mut bad = good.clone();
            bad[at] = value;
            if let Ok(header) = read_header(&bad) {
                assert!(header.geometry.is_valid() && header.patches.len() <= 64);
            }
        }
    }
}

/// Check that what an image cannot be made for is an error.
#[test]
fn impossible_images_are_refused() {
    let geometry = Geometry {
        shards: 300,
        ..GEOMETRY
    };
    let made = |at, data, geometry| assemble(at, data, geometry, &[]);
    assert!(matches!(
        made(0x1000, 0x2000, geometry),
        Err(ImageError::Geometry(_))
    ));
    assert!(matches!(
        made(0x1001, 0x2000, GEOMETRY),
        Err(ImageError::Unaligned(0x1001))
    ));
    assert!(matches!(
        made(0x1000, 0x2010, GEOMETRY),
        Err(ImageError::Unaligned(0x2010))
    ));
    let image = made(0x1000, 0x2000, GEOMETRY).unwrap();
    assert!(read_header(&image.bytes).unwrap().patches.is_empty());
}

/// Instructions of the stubs: all of them, templates and common part.
fn instructions() -> Vec<Instruction> {
    Decoder::with_ip(64, stubs::code(), 0, DecoderOptions::NONE)
        .into_iter()
        .filter(|instruction| !matches!(instruction.code(), Code::Int3 | Code::Ud2))
        .collect()
}

/// Check that the stubs touch general registers and nothing else: no vector registers, no
/// mask registers, no floating point, no system call, no indirect branch; and that they
/// write neither `rbx`, `rbp` nor `r10` to `r15` at all.
#[test]
fn the_stubs_touch_general_registers_only() {
    let mut factory = InstructionInfoFactory::new();
    let instructions = instructions();
    assert!(instructions.len() > 200);
    for instruction in instructions {
        assert!(!instruction.is_invalid(), "at {:x}", instruction.ip());
        assert!(
            !instruction.is_jmp_near_indirect() && !instruction.is_call_near_indirect(),
            "{instruction}"
        );
        assert!(!instruction.is_privileged() && instruction.code() != Code::Syscall);
        for used in factory.info(&instruction).used_registers() {
            let register = used.register().full_register();
            let allowed = [
                Register::RAX,
                Register::RCX,
                Register::RDX,
                Register::RSI,
                Register::RDI,
                Register::R8,
                Register::R9,
                Register::RSP,
                Register::FS,
            ];
            assert!(
                allowed.contains(&register) || register.is_segment_register(),
                "{instruction} uses {register:?}"
            );
        }
    }
}

/// Check that no displacement of the shared memory's places has been left as it was
/// assembled: the numbers that stand for them are gone from an image.
#[test]
fn everything_is_patched() {
    let rig = Rig::new(&fakes::all());
    let placeholder = 0x1122_3344_5566_7788_u64.to_le_bytes();
    let count = |bytes: &[u8], number: &[u8]| {
        bytes
            .windows(number.len())
            .filter(|bytes| *bytes == number)
            .count()
    };
    let short = &[0xff, 0xff, 0xff, 0x7f];
    assert!(count(stubs::code(), &placeholder) >= 10);
    assert!(count(stubs::code(), short) >= 10);
    assert_eq!(count(&rig.image.bytes, &placeholder), 0);
    assert_eq!(count(&rig.image.bytes, short), 0);
}
