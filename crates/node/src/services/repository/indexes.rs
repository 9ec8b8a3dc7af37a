//! The files git keeps beside objects to find them faster: commit graphs, bitmaps, multi-pack indexes. Only their headers
//! are read. One that vanishes meanwhile, or is none, is not told of: it helps git no more than us.

use std::{
    fs,
    io::{self, Read as _},
    path::{Path, PathBuf},
};

use tabularium_proto::gitaly::repository_info_response::{BitmapInfo, CommitGraphInfo, MultiPackIndexInfo};

/// A chunk's name and offset.
const CHUNK_ENTRY_BYTES: usize = 12;
/// Most commit graphs that one chain has.
const MAX_CHAIN_BYTES: u64 = 1024 * 1024;

/// What there is in a directory of objects.
#[derive(Debug, Default, PartialEq)]
pub(super) struct Indexes {
    pub(super) commit_graph: Option<CommitGraphInfo>,
    pub(super) bitmap: Option<BitmapInfo>,
    pub(super) multi_pack_index: Option<MultiPackIndexInfo>,
    pub(super) multi_pack_index_bitmap: Option<BitmapInfo>,
}

impl Indexes {
    /// Those of an object directory.
    pub(super) fn read(objects: &Path) -> io::Result<Self> {
        let mut indexes = Self { commit_graph: commit_graph(&objects.join("info"))?, ..Self::default() };
        let entries = match fs::read_dir(objects.join("pack")) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(indexes),
            Err(error) => return Err(error),
        };
        for entry in entries {
            let entry = entry?;
            let name = entry.file_name();
            let Some(name) = name.to_str() else { continue };
            let bitmap = name.strip_suffix(".bitmap");
            if name == "multi-pack-index" {
                indexes.multi_pack_index =
                    head_of(&entry.path())?.as_deref().and_then(parse_multi_pack_index);
            } else if bitmap.is_some_and(|name| name.starts_with("multi-pack-index-")) {
                indexes.multi_pack_index_bitmap = head_of(&entry.path())?.as_deref().and_then(parse_bitmap);
            } else if bitmap.is_some_and(|name| name.starts_with("pack-")) {
                indexes.bitmap = head_of(&entry.path())?.as_deref().and_then(parse_bitmap);
            }
        }
        Ok(indexes)
    }
}

/// As much of a file as headers and tables of contents take at most.
fn head_of(path: &Path) -> io::Result<Option<Vec<u8>>> {
    const MOST: u64 = 4096;
    read_at_most(path, MOST)
}

fn read_at_most(path: &Path, most: u64) -> io::Result<Option<Vec<u8>>> {
    let file = match fs::File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error),
    };
    let mut head = Vec::new();
    file.take(most).read_to_end(&mut head)?;
    Ok(Some(head))
}

fn commit_graph(info: &Path) -> io::Result<Option<CommitGraphInfo>> {
    let chain = info.join("commit-graphs");
    let (graphs, length): (Vec<PathBuf>, u64) =
        match read_at_most(&chain.join("commit-graph-chain"), MAX_CHAIN_BYTES)? {
            None => (vec![info.join("commit-graph")], 0),
            Some(ids) => {
                let ids = String::from_utf8_lossy(&ids).into_owned();
                let graphs: Vec<PathBuf> =
                    ids.lines().map(|id| chain.join(format!("graph-{id}.graph"))).collect();
                let length = u64::try_from(graphs.len()).unwrap_or(u64::MAX);
                (graphs, length)
            }
        };
    let mut found = None;
    for graph in graphs {
        let Some(chunks) = head_of(&graph)?.as_deref().and_then(graph_chunks) else { continue };
        let told =
            found.get_or_insert(CommitGraphInfo { commit_graph_chain_length: length, ..Default::default() });
        let has = |name: &[u8; 4]| chunks.contains(name);
        told.has_bloom_filters |= has(b"BIDX") && has(b"BDAT");
        told.has_generation_data |= has(b"GDA2");
        told.has_generation_data_overflow |= has(b"GDO2");
    }
    Ok(found)
}

/// The names in a table of contents.
fn chunks(table: &[u8], count: u8) -> Option<Vec<[u8; 4]>> {
    let table = table.get(..usize::from(count) * CHUNK_ENTRY_BYTES)?;
    table.chunks_exact(CHUNK_ENTRY_BYTES).map(|entry| entry.get(..4)?.try_into().ok()).collect()
}

/// gitformat-commit-graph(5): signature, version, hash, chunks, base graphs.
fn graph_chunks(head: &[u8]) -> Option<Vec<[u8; 4]>> {
    let (header, table) = head.split_at_checked(8)?;
    match header {
        [b'C', b'G', b'P', b'H', 1, _, count, _] => chunks(table, *count),
        _ => None,
    }
}

/// gitformat-pack(5): signature, version, hash, chunks, base indexes, packs.
fn parse_multi_pack_index(head: &[u8]) -> Option<MultiPackIndexInfo> {
    let (header, table) = head.split_at_checked(12)?;
    let [b'M', b'I', b'D', b'X', 1, _, count, 0, packs @ ..] = header else { return None };
    let chunks = chunks(table, *count)?;
    Some(MultiPackIndexInfo {
        packfile_count: u32::from_be_bytes(packs.try_into().ok()?).into(),
        version: 1,
        has_large_offsets: chunks.contains(b"LOFF"),
        has_bitmapped_packs: chunks.contains(b"BTMP"),
        has_reverse_index: chunks.contains(b"RIDX"),
    })
}

/// gitformat-bitmap(5): signature, version, flags.
fn parse_bitmap(head: &[u8]) -> Option<BitmapInfo> {
    const HASH_CACHE: u16 = 0x4;
    const LOOKUP_TABLE: u16 = 0x10;
    let [b'B', b'I', b'T', b'M', 0, 1, flags @ ..] = head.get(..8)? else { return None };
    let flags = u16::from_be_bytes(flags.try_into().ok()?);
    Some(BitmapInfo {
        has_hash_cache: flags & HASH_CACHE != 0,
        has_lookup_table: flags & LOOKUP_TABLE != 0,
        version: 1,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_and_what_is_none() {
        let table = |names: &[&[u8; 4]]| -> Vec<u8> {
            names.iter().flat_map(|name| [name.as_slice(), &[0; 8]].concat()).collect()
        };
        let graph = [b"CGPH\x01\x01\x02\x00".as_slice(), &table(&[b"GDA2", b"BIDX"])].concat();
        assert_eq!(graph_chunks(&graph).unwrap(), [*b"GDA2", *b"BIDX"]);
        assert_eq!(graph_chunks(&graph[..20]), None, "cut off");
        assert_eq!(graph_chunks(b"CGPH\x02\x01\x00\x00"), None, "another version");
        let index = [b"MIDX\x01\x01\x01\x00\x00\x00\x00\x03".as_slice(), &table(&[b"RIDX"])].concat();
        let parsed = parse_multi_pack_index(&index).unwrap();
        assert_eq!(
            (parsed.packfile_count, parsed.has_reverse_index, parsed.has_large_offsets),
            (3, true, false)
        );
        assert_eq!(parse_multi_pack_index(&index[..14]), None);
        let bitmap = parse_bitmap(b"BITM\x00\x01\x00\x05rest").unwrap();
        assert_eq!((bitmap.has_hash_cache, bitmap.has_lookup_table, bitmap.version), (true, false, 1));
        for none in [&b"BITM"[..], b"BITM\x00\x02\x00\x05", b"nonsense"] {
            assert_eq!(parse_bitmap(none), None);
        }
        assert_eq!(Indexes::read(Path::new("/nonexistent")).unwrap(), Indexes::default());
    }
}
