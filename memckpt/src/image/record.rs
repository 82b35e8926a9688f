//! The framing of an image file: magic, then records of a little-endian u32 length and a protobuf message.

use prost::Message;

use super::magic::ImageKind;

/// An image file that is not what its name says.
#[derive(Debug, thiserror::Error)]
pub enum RecordError {
    /// The magic is missing or another one.
    #[error("{file}: not a {kind:?} image")]
    Magic {
        /// The file.
        file: String,
        /// What was expected.
        kind: ImageKind,
    },
    /// The file ends inside a record, or a length points past its end.
    #[error("{file}: record {record} is cut off: {needed} bytes announced, {left} left")]
    Truncated {
        /// The file.
        file: String,
        /// The record, from 0.
        record: usize,
        /// Bytes that the record, or its length field, takes.
        needed: u64,
        /// Bytes that the file still has.
        left: u64,
    },
    /// A record is no message of the expected type.
    #[error("{file}: record {record} is damaged: {source}")]
    Decode {
        /// The file.
        file: String,
        /// The record, from 0.
        record: usize,
        /// What the decoder says.
        source: prost::DecodeError,
    },
    /// The file ends before a record that must be there.
    #[error("{file}: record {record} is missing")]
    Missing {
        /// The file.
        file: String,
        /// The record, from 0.
        record: usize,
    },
    /// A record decodes, but what it says cannot be.
    #[error("{file}: record {record}: {reason}")]
    Content {
        /// The file.
        file: String,
        /// The record, from 0.
        record: usize,
        /// What is wrong.
        reason: String,
    },
}

/// Reads the records of an image from memory.
#[derive(Debug)]
pub struct Records<'a> {
    file: String,
    rest: &'a [u8],
    record: usize,
}

impl<'a> Records<'a> {
    /// Reads `bytes`, the content of `file`, as an image of `kind`.
    ///
    /// # Errors
    /// The magic is not that of `kind`.
    pub fn open(file: &str, kind: ImageKind, bytes: &'a [u8]) -> Result<Self, RecordError> {
        let Some(rest) = bytes.strip_prefix(kind.header().as_slice()) else {
            return Err(RecordError::Magic { file: file.to_owned(), kind });
        };
        Ok(Self { file: file.to_owned(), rest, record: 0 })
    }

    /// The next record, or `None` at the end of the file.
    ///
    /// # Errors
    /// The record is cut off or no `M`.
    pub fn next_record<M: Message + Default>(&mut self) -> Result<Option<M>, RecordError> {
        if self.rest.is_empty() {
            return Ok(None);
        }
        let cut = |needed: u64, left: usize| RecordError::Truncated {
            file: self.file.clone(),
            record: self.record,
            needed,
            left: left as u64,
        };
        let (len, rest) = self.rest.split_first_chunk::<4>().ok_or_else(|| cut(4, self.rest.len()))?;
        let len = u32::from_le_bytes(*len);
        let (body, rest) =
            rest.split_at_checked(len as usize).ok_or_else(|| cut(u64::from(len), rest.len()))?;
        let message = M::decode(body).map_err(|source| RecordError::Decode {
            file: self.file.clone(),
            record: self.record,
            source,
        })?;
        self.rest = rest;
        self.record += 1;
        Ok(Some(message))
    }

    /// The next record, which must be there.
    ///
    /// # Errors
    /// As [`Self::next_record`], and when the file ends here.
    pub fn expect<M: Message + Default>(&mut self) -> Result<M, RecordError> {
        self.next_record()?
            .ok_or_else(|| RecordError::Missing { file: self.file.clone(), record: self.record })
    }

    /// The next `len` bytes, which belong to the record before them.
    ///
    /// # Errors
    /// The file ends before.
    pub fn raw(&mut self, len: u64) -> Result<&'a [u8], RecordError> {
        let taken = usize::try_from(len).ok().and_then(|len| self.rest.split_at_checked(len));
        let (bytes, rest) = taken.ok_or_else(|| RecordError::Truncated {
            file: self.file.clone(),
            record: self.record.saturating_sub(1),
            needed: len,
            left: self.rest.len() as u64,
        })?;
        self.rest = rest;
        Ok(bytes)
    }

    /// All bytes that are left; they belong to the record before them.
    pub fn everything(&mut self) -> &'a [u8] {
        std::mem::take(&mut self.rest)
    }

    /// All records that are left.
    ///
    /// # Errors
    /// As [`Self::next_record`].
    pub fn rest<M: Message + Default>(&mut self) -> Result<Vec<M>, RecordError> {
        let mut all = Vec::new();
        while let Some(message) = self.next_record()? {
            all.push(message);
        }
        Ok(all)
    }

    /// An error about the record read last.
    #[must_use]
    pub fn content_error(&self, reason: impl Into<String>) -> RecordError {
        RecordError::Content {
            file: self.file.clone(),
            record: self.record.saturating_sub(1),
            reason: reason.into(),
        }
    }
}

/// The only record of an image.
///
/// # Errors
/// As [`Records::expect`], or there are more.
pub fn single<M: Message + Default>(file: &str, kind: ImageKind, bytes: &[u8]) -> Result<M, RecordError> {
    let mut records = Records::open(file, kind, bytes)?;
    let message = records.expect()?;
    if !records.rest.is_empty() {
        return Err(records.content_error("more follows, where one record was expected"));
    }
    Ok(message)
}

/// An image being put together in memory.
#[derive(Debug)]
pub struct Image {
    bytes: Vec<u8>,
}

impl Image {
    /// An image of `kind` without records.
    #[must_use]
    pub fn new(kind: ImageKind) -> Self {
        Self { bytes: kind.header() }
    }

    /// Adds a record. Records are far below the 4 GiB that their length field can say: the largest is an `mm_entry`
    /// with 65,530 areas of some 60 bytes.
    pub fn push(&mut self, message: &impl Message) {
        let len = u32::try_from(message.encoded_len()).unwrap_or(u32::MAX);
        self.bytes.extend_from_slice(&len.to_le_bytes());
        self.bytes.extend_from_slice(&message.encode_to_vec());
    }

    /// Adds bytes behind the record that tells of them: what a pipe, a queue or a ghost file holds.
    pub fn push_raw(&mut self, bytes: &[u8]) {
        self.bytes.extend_from_slice(bytes);
    }

    /// An image of `kind` with `records`.
    #[must_use]
    pub fn of<'a, M: Message + 'a>(kind: ImageKind, records: impl IntoIterator<Item = &'a M>) -> Self {
        let mut image = Self::new(kind);
        records.into_iter().for_each(|record| image.push(record));
        image
    }

    /// [`Self::push`] as part of an expression.
    #[must_use]
    pub fn with(mut self, message: &impl Message) -> Self {
        self.push(message);
        self
    }

    /// The bytes of the file.
    #[must_use]
    pub fn into_bytes(self) -> Vec<u8> {
        self.bytes
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::proto::{InventoryEntry, MmEntry, PagemapEntry, PstreeEntry};
    use super::*;

    fn pstree(pid: u32) -> PstreeEntry {
        PstreeEntry { pid, ppid: 0, pgid: pid, sid: pid, threads: vec![pid, pid + 1] }
    }

    #[test]
    fn every_cut_is_an_error_that_names_file_and_record() {
        let whole = Image::new(ImageKind::Pstree).with(&pstree(300)).with(&pstree(700)).into_bytes();
        let first = Image::new(ImageKind::Pstree).with(&pstree(300)).into_bytes().len();
        for cut in 0..whole.len() {
            let read = Records::open("pstree.img", ImageKind::Pstree, &whole[..cut])
                .and_then(|mut r| r.rest::<PstreeEntry>());
            match read {
                Ok(records) => {
                    assert!((cut == 8 && records.is_empty()) || (cut == first && records.len() == 1));
                }
                Err(e) => {
                    let text = e.to_string();
                    assert!(text.starts_with("pstree.img: "), "{text}");
                    if cut > first {
                        assert!(text.contains("record 1 "), "{text}");
                    }
                }
            }
        }
    }

    #[test]
    fn a_length_beyond_the_file_allocates_nothing() {
        let mut bytes = ImageKind::Pstree.header();
        bytes.extend_from_slice(&u32::MAX.to_le_bytes());
        let error =
            Records::open("p", ImageKind::Pstree, &bytes).and_then(|mut r| r.next_record::<PstreeEntry>());
        assert!(
            matches!(error, Err(RecordError::Truncated { record: 0, needed, left: 0, .. }) if needed == u64::from(u32::MAX))
        );
    }

    #[test]
    fn a_second_record_is_refused_where_one_is_expected() {
        let entry = InventoryEntry { img_version: 2, ..Default::default() };
        let bytes = Image::new(ImageKind::Inventory).with(&entry).with(&entry).into_bytes();
        assert!(single::<InventoryEntry>("inventory.img", ImageKind::Inventory, &bytes).is_err());
    }

    proptest! {
        #[test]
        fn garbage_never_panics(body in prop::collection::vec(any::<u8>(), 0..300)) {
            for kind in [ImageKind::Inventory, ImageKind::Mm, ImageKind::Pagemap] {
                let mut bytes = kind.header();
                bytes.extend_from_slice(&body);
                let _ = Records::open("f", kind, &bytes).and_then(|mut r| r.rest::<MmEntry>());
                let _ = Records::open("f", kind, &bytes).and_then(|mut r| r.rest::<PagemapEntry>());
                let _ = Records::open("f", kind, &body).and_then(|mut r| r.rest::<InventoryEntry>());
            }
        }

        #[test]
        fn records_come_back(pids in prop::collection::vec(0u32..u32::MAX - 1, 0..20)) {
            let mut image = Image::new(ImageKind::Pstree);
            pids.iter().for_each(|&pid| image.push(&pstree(pid)));
            let bytes = image.into_bytes();
            let read: Vec<PstreeEntry> = Records::open("f", ImageKind::Pstree, &bytes).unwrap().rest().unwrap();
            prop_assert_eq!(read, pids.into_iter().map(pstree).collect::<Vec<_>>());
        }
    }
}
