//! The kernel's own type information, `/sys/kernel/btf/vmlinux` (Documentation/bpf/btf.rst): where in a structure a
//! member lies, which parameters a function has. Rust's BPF target has no field relocations, so we look ourselves.
//!
//! No input can make this panic: every read is checked, every walk is bounded.

use std::collections::HashMap;

/// The kernel has no usable type information, or lacks what was asked for.
#[derive(Debug, thiserror::Error)]
pub enum BtfError {
    /// The file could not be read: a kernel without CONFIG_DEBUG_INFO_BTF, or no sysfs.
    #[error(transparent)]
    Read(#[from] super::SyscallError),
    /// The data is no BTF, or cut short.
    #[error("malformed BTF: {0}")]
    Malformed(&'static str),
    /// There is no such member.
    #[error("the kernel's BTF has no {structure}.{path}")]
    NoMember {
        /// The structure.
        structure: String,
        /// The member's path.
        path: String,
    },
}

const MAGIC: u16 = 0xeb9f;
const HEADER: usize = 24;
/// Modifiers in a chain, members in a path and anonymous structures in one another: beyond this the data is cyclic.
const MAX_DEPTH: usize = 32;

mod kind {
    pub(super) const INT: u32 = 1;
    pub(super) const PTR: u32 = 2;
    pub(super) const ARRAY: u32 = 3;
    pub(super) const STRUCT: u32 = 4;
    pub(super) const UNION: u32 = 5;
    pub(super) const ENUM: u32 = 6;
    pub(super) const TYPEDEF: u32 = 8;
    pub(super) const VOLATILE: u32 = 9;
    pub(super) const CONST: u32 = 10;
    pub(super) const RESTRICT: u32 = 11;
    pub(super) const FUNC: u32 = 12;
    pub(super) const FUNC_PROTO: u32 = 13;
    pub(super) const VAR: u32 = 14;
    pub(super) const DATASEC: u32 = 15;
    pub(super) const DECL_TAG: u32 = 17;
    pub(super) const TYPE_TAG: u32 = 18;
    pub(super) const ENUM64: u32 = 19;
}

/// Parsed type information.
#[derive(Debug)]
pub struct Btf {
    data: Vec<u8>,
    strings: std::ops::Range<usize>,
    /// Byte offset of each type's record; type 0 is void.
    types: Vec<usize>,
    structs: HashMap<u64, Vec<u32>>,
    funcs: HashMap<u64, u32>,
    typedefs: HashMap<u64, u32>,
}

fn u32_at(data: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(data.get(at..at.checked_add(4)?)?.try_into().ok()?))
}

/// FNV-1a: names are only looked up, and always compared again.
fn hash(name: &[u8]) -> u64 {
    name.iter().fold(0xcbf2_9ce4_8422_2325, |h, b| (h ^ u64::from(*b)).wrapping_mul(0x100_0000_01b3))
}

impl Btf {
    /// The running kernel's.
    ///
    /// # Errors
    /// [`BtfError::Read`] where the kernel offers none.
    pub fn vmlinux() -> Result<Self, BtfError> {
        const PATH: &str = "/sys/kernel/btf/vmlinux";
        let data = std::fs::read(PATH).map_err(|e| super::SyscallError::new("read", PATH, e))?;
        Self::parse(data)
    }

    /// Parses a BTF blob of this machine's byte order.
    ///
    /// # Errors
    /// [`BtfError::Malformed`].
    pub fn parse(data: Vec<u8>) -> Result<Self, BtfError> {
        use BtfError::Malformed;
        let field = |at| u32_at(&data, at).map(|v| v as usize).ok_or(Malformed("short header"));
        if data.get(..2) != Some(&MAGIC.to_le_bytes()) {
            return Err(Malformed("wrong magic"));
        }
        let header = field(4)?;
        if header < HEADER {
            return Err(Malformed("short header"));
        }
        let section = |offset, len| {
            let start = header.checked_add(field(offset)?).ok_or(Malformed("section outside"))?;
            let end = start.checked_add(field(len)?).ok_or(Malformed("section outside"))?;
            if end <= data.len() { Ok(start..end) } else { Err(Malformed("section outside")) }
        };
        let (records, strings) = (section(8, 12)?, section(16, 20)?);
        let mut btf = Self {
            strings,
            types: Vec::with_capacity(records.len() / 20),
            structs: HashMap::new(),
            funcs: HashMap::new(),
            typedefs: HashMap::new(),
            data: Vec::new(),
        };
        btf.types.push(0);
        let mut at = records.start;
        while at < records.end {
            let (name, info) = (field(at)? as u32, field(at + 4)? as u32);
            let (kind, vlen) = ((info >> 24) & 0x1f, (info & 0xffff) as usize);
            let id = btf.types.len() as u32;
            btf.types.push(at);
            let more = match kind {
                kind::INT | kind::VAR | kind::DECL_TAG => 4,
                kind::ARRAY => 12,
                kind::STRUCT | kind::UNION | kind::DATASEC | kind::ENUM64 => vlen * 12,
                kind::ENUM | kind::FUNC_PROTO => vlen * 8,
                kind::PTR | 7..=12 | 16 | kind::TYPE_TAG => 0,
                _ => return Err(Malformed("unknown kind of type")),
            };
            if matches!(kind, kind::STRUCT | kind::UNION | kind::FUNC | kind::TYPEDEF) {
                let key = hash(name_at(&data, &btf.strings, name).ok_or(Malformed("name outside"))?);
                match kind {
                    kind::FUNC => _ = btf.funcs.insert(key, id),
                    kind::TYPEDEF => _ = btf.typedefs.insert(key, id),
                    _ => btf.structs.entry(key).or_default().push(id),
                }
            }
            at += 12 + more;
        }
        if at != records.end {
            return Err(Malformed("type record cut short"));
        }
        btf.data = data;
        Ok(btf)
    }

    fn name(&self, offset: u32) -> &[u8] {
        name_at(&self.data, &self.strings, offset).unwrap_or_default()
    }

    /// Offset of a type's record, its kind and its number of members.
    fn record(&self, id: u32) -> Option<(usize, u32, usize)> {
        let at = *self.types.get(id as usize)?;
        if id == 0 {
            return None;
        }
        let info = u32_at(&self.data, at + 4)?;
        Some((at, (info >> 24) & 0x1f, (info & 0xffff) as usize))
    }

    /// The type behind typedefs and qualifiers.
    fn strip(&self, mut id: u32) -> Option<u32> {
        for _ in 0..MAX_DEPTH {
            let (at, kind, _) = self.record(id)?;
            match kind {
                kind::TYPEDEF | kind::VOLATILE | kind::CONST | kind::RESTRICT | kind::TYPE_TAG => {
                    id = u32_at(&self.data, at + 8)?;
                }
                _ => return Some(id),
            }
        }
        None
    }

    /// Offset in bytes and type of a member, anonymous members looked into. A bit field gives its byte.
    fn member(&self, id: u32, wanted: &[u8], depth: usize) -> Option<(u32, u32)> {
        let (at, kind, count) = self.record(self.strip(id)?)?;
        if depth == 0 || !matches!(kind, kind::STRUCT | kind::UNION) {
            return None;
        }
        let bit_fields = u32_at(&self.data, at + 4)? >> 31 != 0;
        (0..count).find_map(|i| {
            let member = at + 12 + i * 12;
            let (name, ty) = (u32_at(&self.data, member)?, u32_at(&self.data, member + 4)?);
            let mut offset = u32_at(&self.data, member + 8)?;
            if bit_fields {
                offset &= 0xff_ffff;
            }
            let name = self.name(name);
            if name == wanted {
                return Some((offset / 8, ty));
            }
            if !name.is_empty() {
                return None;
            }
            let (inner, ty) = self.member(ty, wanted, depth - 1)?;
            Some(((offset / 8).checked_add(inner)?, ty))
        })
    }

    /// Offset in bytes of `path` (members joined by dots) in the structure or union `structure`.
    ///
    /// # Errors
    /// [`BtfError::NoMember`].
    pub fn offset_of(&self, structure: &str, path: &str) -> Result<u32, BtfError> {
        let candidates = self.structs.get(&hash(structure.as_bytes())).map_or(&[][..], Vec::as_slice);
        candidates
            .iter()
            .find_map(|&id| {
                let (at, ..) = self.record(id)?;
                if self.name(u32_at(&self.data, at)?) != structure.as_bytes() {
                    return None;
                }
                path.split('.').try_fold((0u32, id), |(total, ty), part| {
                    let (offset, ty) = self.member(ty, part.as_bytes(), MAX_DEPTH)?;
                    Some((total.checked_add(offset)?, ty))
                })
            })
            .map(|(offset, _)| offset)
            .ok_or_else(|| BtfError::NoMember { structure: structure.into(), path: path.into() })
    }

    fn parameters_of_proto(&self, id: u32) -> Option<Vec<String>> {
        let (at, kind, count) = self.record(id)?;
        if kind != kind::FUNC_PROTO {
            return None;
        }
        (0..count)
            .map(|i| {
                let name = u32_at(&self.data, at + 12 + i * 8)?;
                Some(String::from_utf8_lossy(self.name(name)).into_owned())
            })
            .collect()
    }

    /// The names of a kernel function's parameters; `None` if there is no such function.
    #[must_use]
    pub fn parameters(&self, function: &str) -> Option<Vec<String>> {
        let (at, ..) = self.record(*self.funcs.get(&hash(function.as_bytes()))?)?;
        if self.name(u32_at(&self.data, at)?) != function.as_bytes() {
            return None;
        }
        self.parameters_of_proto(u32_at(&self.data, at + 8)?)
    }

    /// How many arguments a tracepoint passes; `None` if there is no such tracepoint.
    #[must_use]
    pub fn tracepoint_arguments(&self, tracepoint: &str) -> Option<usize> {
        let name = format!("btf_trace_{tracepoint}");
        let (at, ..) = self.record(*self.typedefs.get(&hash(name.as_bytes()))?)?;
        if self.name(u32_at(&self.data, at)?) != name.as_bytes() {
            return None;
        }
        let (pointer, kind, _) = self.record(u32_at(&self.data, at + 8)?)?;
        if kind != kind::PTR {
            return None;
        }
        // The first parameter is the tracepoint's private data.
        self.parameters_of_proto(u32_at(&self.data, pointer + 8)?)?.len().checked_sub(1)
    }
}

fn name_at<'a>(data: &'a [u8], strings: &std::ops::Range<usize>, offset: u32) -> Option<&'a [u8]> {
    let rest = data.get(strings.clone())?.get(offset as usize..)?;
    rest.iter().position(|b| *b == 0).map(|end| &rest[..end])
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use proptest::prelude::*;

    use super::*;

    /// Builds a blob from type records (words) and NUL-separated strings.
    fn blob(types: &[u32], strings: &str) -> Vec<u8> {
        let types: Vec<u8> = types.iter().flat_map(|w| w.to_le_bytes()).collect();
        let mut out = Vec::from(MAGIC.to_le_bytes());
        out.extend([1, 0]);
        for word in [24, 0, types.len() as u32, types.len() as u32, strings.len() as u32] {
            out.extend(word.to_le_bytes());
        }
        out.extend(types);
        out.extend(strings.as_bytes());
        out
    }

    const STRINGS: &str = "\0outer\0inner\0deep\0f\0arg\0btf_trace_tp\0";
    const OUTER: u32 = 1;
    const INNER: u32 = 7;
    const DEEP: u32 = 13;
    const F: u32 = 18;
    const ARG: u32 = 20;
    const TP: u32 = 24;

    fn sample() -> Vec<u8> {
        #[rustfmt::skip]
        let types = [
            0, kind::INT << 24, 8, 64,                              // 1: a 64-bit int
            0, kind::UNION << 24 | 1, 8, DEEP, 1, 0,                // 2: union { deep }
            OUTER, kind::STRUCT << 24 | 2, 24, INNER, 4, 64, 0, 2, 128, // 3: struct outer { const.. inner @8; union @16 }
            0, kind::CONST << 24, 5,                                // 4: const 5
            0, kind::STRUCT << 24 | 1, 8, DEEP, 1, 32,              // 5: struct { deep @4 }
            0, kind::FUNC_PROTO << 24 | 2, 0, 0, 1, ARG, 1,         // 6: (void *data, int arg)
            F, kind::FUNC << 24, 6,                                 // 7: f
            0, kind::PTR << 24, 6,                                  // 8
            TP, kind::TYPEDEF << 24, 8,                             // 9: btf_trace_tp
        ];
        blob(&types, STRINGS)
    }

    #[test]
    fn finds_members_through_paths_and_anonymous_unions() {
        let btf = Btf::parse(sample()).unwrap();
        assert_eq!(btf.offset_of("outer", "inner").unwrap(), 8);
        assert_eq!(btf.offset_of("outer", "inner.deep").unwrap(), 12);
        assert_eq!(btf.offset_of("outer", "deep").unwrap(), 16);
        assert!(btf.offset_of("outer", "absent").is_err());
        assert!(btf.offset_of("absent", "inner").is_err());
        assert_eq!(btf.parameters("f").unwrap(), ["", "arg"]);
        assert_eq!(btf.parameters("g"), None);
        assert_eq!(btf.tracepoint_arguments("tp"), Some(1));
    }

    #[test]
    fn cyclic_types_end() {
        // typedef of itself, and a struct that holds itself anonymously
        let types = [OUTER, kind::STRUCT << 24 | 1, 8, 0, 1, 0, INNER, kind::TYPEDEF << 24, 2];
        let btf = Btf::parse(blob(&types, STRINGS)).unwrap();
        assert!(btf.offset_of("outer", "deep").is_err());
        assert_eq!(btf.strip(2), None);
    }

    proptest! {
        #[test]
        fn damage_never_panics(cut in 0usize..300, at in 0usize..300, byte in any::<u8>()) {
            let mut data = sample();
            if let Some(b) = data.get_mut(at) { *b = byte; }
            data.truncate(cut.max(4));
            if let Ok(btf) = Btf::parse(data) {
                let _ = btf.offset_of("outer", "inner.deep");
                let _ = btf.offset_of("outer", "deep");
                let _ = btf.parameters("f");
                let _ = btf.tracepoint_arguments("tp");
            }
        }
    }

    #[test]
    fn reads_the_running_kernel() {
        let btf = match Btf::vmlinux() {
            Ok(btf) => btf,
            Err(error) => {
                let _ = writeln!(
                    std::io::stderr(),
                    "memckpt-test-skip: kernel::btf::tests::reads_the_running_kernel: {error}"
                );
                return;
            }
        };
        assert!(btf.offset_of("vm_area_struct", "vm_mm").unwrap() > 0);
        // rb and mm_mt live in an anonymous struct of mm_struct
        assert!(btf.offset_of("mm_struct", "mm_mt").is_ok());
        assert_eq!(btf.parameters("handle_mm_fault").unwrap()[..2], ["vma", "address"]);
        assert_eq!(btf.tracepoint_arguments("sys_exit"), Some(2));
    }
}
