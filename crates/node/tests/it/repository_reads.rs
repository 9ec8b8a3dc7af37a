//! RepositoryService: what can be looked up in a repository.

use std::process::Stdio;

use tabularium_proto::gitaly::{
    CreateBundleFromRefListRequest, CreateBundleRequest, FastExportRequest, FindLicenseRequest,
    FindLicenseResponse, FindMergeBaseRequest, GetFileAttributesRequest, GetInfoAttributesRequest,
    GetRawChangesRequest, ObjectsSizeRequest, Repository, RepositoryInfoRequest, SearchFilesByContentRequest,
    SearchFilesByNameRequest,
    get_raw_changes_response::{RawChange, raw_change::Operation},
};
use tonic::{Code, Status};

use crate::{
    harness::{TestNode, commit, git, git_command},
    seed::{self, all, id, invalid, refusal},
};

fn dash(doing: &str) -> (Code, String) {
    let text = format!("{doing}positional arg \"--output=x\" cannot start with dash '-': invalid argument");
    (Code::Internal, text)
}

#[tokio::test]
async fn where_histories_meet() {
    let node = TestNode::start().await;
    let repository = seed::repository(&node, "a.git").await;
    let path = node.path("a.git");
    git(&path, &["update-ref", "refs/heads/other", &commit(&path, Some("side"), "other")]);
    git(&path, &["update-ref", "refs/heads/alone", &commit(&path, None, "alone")]);
    let base = async |revisions: &[&str]| {
        let revisions = revisions.iter().map(|name| name.as_bytes().to_vec()).collect();
        let request = FindMergeBaseRequest { repository: Some(repository.clone()), revisions };
        node.repositories().find_merge_base(request).await.map(|answer| answer.into_inner().base)
    };
    assert_eq!(base(&["main", "other"]).await.unwrap(), id(&node, "a.git", "side"));
    assert_eq!(base(&["main", "other", "v2"]).await.unwrap(), id(&node, "a.git", "v2^{}"));
    for nothing in [["main", "alone"], ["main", "none"]] {
        assert_eq!(base(&nothing).await.unwrap(), "");
    }
    assert_eq!(refusal(base(&["main"]).await), invalid("at least 2 revisions are required"));
    assert_eq!(refusal(base(&["main", "--output=x"]).await), dash("cmd: "));
}

#[tokio::test]
async fn raw_changes_with_sizes() {
    let node = TestNode::start().await;
    let repository = seed::repository(&node, "a.git").await;
    let stream = b"commit refs/heads/moved\ncommitter A <a@x> 1 +0000\ndata 1\nm\nfrom refs/heads/main\n\
                   R a/b/c/deep.txt gr\xfcn\nD run.sh\n\n";
    seed::fast_import(&node.path("a.git"), stream);
    let changes = async |from: &str, to: &str| {
        let request = GetRawChangesRequest {
            repository: Some(repository.clone()),
            from_revision: from.into(),
            to_revision: to.into(),
        };
        let messages = all(node.repositories().get_raw_changes(request).await).await?;
        Ok::<Vec<RawChange>, Status>(messages.into_iter().flat_map(|message| message.raw_changes).collect())
    };
    let zero = "0".repeat(40);
    let found = changes(&zero, "main").await.unwrap();
    assert_eq!(found.len(), 5);
    assert!(
        found.iter().all(|change| change.operation() == Operation::Added && change.old_path_bytes.is_empty())
    );
    let module = found.iter().find(|change| change.new_path_bytes == b"module").unwrap();
    assert_eq!((module.blob_id.as_str(), module.size, module.new_mode), ("", 0, 0o160_000));
    let big = found.iter().find(|change| change.new_path_bytes == b"big.bin").unwrap();
    assert_eq!((big.blob_id.as_str(), big.size), (id(&node, "a.git", "main:big.bin").as_str(), 300 * 1024));
    let found = changes("main", "moved").await.unwrap();
    assert_eq!(found.len(), 2);
    let deleted = found.iter().find(|change| change.operation() == Operation::Deleted).unwrap();
    assert_eq!(
        (deleted.old_path_bytes.as_slice(), deleted.new_path_bytes.len(), deleted.size),
        (&b"run.sh"[..], 0, 9)
    );
    let renamed = found.iter().find(|change| change.operation() == Operation::Renamed).unwrap();
    assert_eq!(
        (renamed.old_path_bytes.as_slice(), renamed.new_path_bytes.as_slice()),
        (&b"a/b/c/deep.txt"[..], &b"gr\xfcn"[..])
    );
    assert_eq!(changes("side", "main~").await.unwrap()[0].operation(), Operation::Modified);
    assert_eq!(changes("main", &zero).await.unwrap(), []);
    assert_eq!(refusal(changes("none", "main").await), invalid("invalid 'from' revision: \"none\""));
    assert_eq!(
        refusal(changes("main", "--output=x").await),
        invalid("invalid 'to' revision: \"--output=x\"")
    );
}

#[tokio::test]
async fn files_are_found_by_name_and_content() {
    let node = TestNode::start().await;
    let repository = node.create("a.git").await;
    let mut stream = b"commit refs/heads/main\ncommitter A <a@x> 1 +0000\ndata 1\nm\n".to_vec();
    let lines = (0..30).map(|number| format!("line {number}")).collect::<Vec<_>>().join("\n") + "\n";
    let long = "needle ".repeat(30_000) + "\n";
    for (path, content) in [
        (&b"dir/a.rb"[..], lines.as_str()),
        (b"dir/gr\xfcn.rb", "Line 7\n"),
        (b"long", &long),
        (b"other", "x\n"),
    ] {
        stream.extend(
            [b"M 100644 inline ", path, format!("\ndata {}\n{content}\n", content.len()).as_bytes()].concat(),
        );
    }
    seed::fast_import(&node.path("a.git"), &stream);
    let content = async |query: &str, reference: &str| {
        let request = SearchFilesByContentRequest {
            repository: Some(repository.clone()),
            query: query.into(),
            r#ref: reference.into(),
        };
        let messages = all(node.repositories().search_files_by_content(request).await).await?;
        let (mut matches, mut open) = (Vec::new(), Vec::new());
        for message in messages {
            assert!(message.match_data.len() <= 128 * 1024);
            open.extend(message.match_data);
            if message.end_of_match {
                matches.push(String::from_utf8_lossy(&std::mem::take(&mut open)).into_owned());
            }
        }
        assert!(open.is_empty());
        Ok::<_, Status>(matches)
    };
    let found = content("LINE (7|20)$", "main").await.unwrap();
    assert_eq!(found.len(), 3, "{found:?}");
    assert_eq!(found[0].lines().count(), 5);
    assert!(found[0].starts_with("main:dir/a.rb\x006\0line 5\n"), "{:?}", found[0]);
    assert_eq!(found[2], "main:dir/gr\u{fffd}n.rb\x001\0Line 7\n");
    assert_eq!(content("needle", "main").await.unwrap()[0].len(), "main:long\x001\0".len() + long.len());
    for (query, reference) in
        [("nowhere", "main"), ("line", "none"), ("(", "main"), ("--output=/tmp/x", "main")]
    {
        assert_eq!(content(query, reference).await.unwrap(), Vec::<String>::new(), "{query}");
    }
    assert_eq!(refusal(content("", "main").await), invalid("no query given"));
    assert_eq!(refusal(content("x", "").await), invalid("no ref given"));
    assert_eq!(refusal(content("x", "--output=x").await), invalid("invalid ref argument"));

    let request = |query: &str, filter: &str| SearchFilesByNameRequest {
        repository: Some(repository.clone()),
        query: query.into(),
        r#ref: b"main".to_vec(),
        filter: filter.into(),
        ..Default::default()
    };
    let names = async |request: SearchFilesByNameRequest| {
        let messages = all(node.repositories().search_files_by_name(request).await).await?;
        assert_eq!(messages.len(), 1);
        Ok::<_, Status>(messages.into_iter().flat_map(|message| message.files).collect::<Vec<_>>())
    };
    assert_eq!(names(request("dir", "")).await.unwrap(), [&b"dir/a.rb"[..], b"dir/gr\xfcn.rb"]);
    assert_eq!(names(request(".", r"^o|\.rb$")).await.unwrap().len(), 3);
    let page = SearchFilesByNameRequest { limit: 1, offset: 1, ..request(".", "") };
    assert_eq!(names(page).await.unwrap(), [b"dir/gr\xfcn.rb"]);
    assert_eq!(names(request("none", "")).await.unwrap(), Vec::<Vec<u8>>::new());
    let unknown = SearchFilesByNameRequest { r#ref: b"none".to_vec(), ..request("dir", "") };
    assert_eq!(names(unknown).await.unwrap(), Vec::<Vec<u8>>::new());
    assert_eq!(refusal(names(request("", "")).await), invalid("no query given"));
    let dashed = SearchFilesByNameRequest { r#ref: b"-x".to_vec(), ..request("x", "") };
    assert_eq!(refusal(names(dashed).await), invalid("invalid ref argument"));
    assert_eq!(
        refusal(names(request("x", &"a".repeat(1001))).await),
        invalid("filter exceeds maximum length")
    );
    let (code, text) = refusal(names(request("x", "+*.")).await);
    assert_eq!(code, Code::InvalidArgument);
    assert!(text.starts_with("filter did not compile: error parsing regexp: "), "{text}");
}

#[tokio::test]
async fn attributes_of_files() {
    let node = TestNode::start().await;
    let repository = node.create("a.git").await;
    let attributes = "*.rb diff=ruby -text\n*.bin binary\n";
    let stream = format!(
        "commit refs/heads/main\ncommitter A <a@x> 1 +0000\ndata 1\nm\nM 100644 inline .gitattributes\ndata {}\n{attributes}\n",
        attributes.len()
    );
    seed::fast_import(&node.path("a.git"), stream.as_bytes());
    let request = |revision: &str, paths: &[&str], attributes: &[&str]| GetFileAttributesRequest {
        repository: Some(repository.clone()),
        revision: revision.into(),
        paths: paths.iter().map(|&path| path.to_owned()).collect(),
        attributes: attributes.iter().map(|&name| name.to_owned()).collect(),
    };
    let ask = async |request: GetFileAttributesRequest| {
        let answer = node.repositories().get_file_attributes(request).await?.into_inner();
        let told = answer
            .attribute_infos
            .into_iter()
            .map(|info| format!("{} {}={}", info.path, info.attribute, info.value));
        Ok::<_, Status>(told.collect::<Vec<_>>())
    };
    let found = ask(request("main", &["a b.rb", "x.bin", "-n"], &["diff", "text"])).await.unwrap();
    assert_eq!(found, ["a b.rb diff=ruby", "a b.rb text=unset", "x.bin diff=unset", "x.bin text=unset"]);
    assert_eq!(refusal(ask(request("", &["a"], &["diff"])).await), invalid("revision is required"));
    assert_eq!(refusal(ask(request("main", &[], &["diff"])).await), invalid("file paths are required"));
    assert_eq!(refusal(ask(request("main", &["a"], &[])).await), invalid("attributes are required"));
    let text = "check attr: path with NUL byte not allowed";
    assert_eq!(refusal(ask(request("main", &["a\0"], &["diff"])).await), (Code::Internal, text.to_owned()));
    assert_eq!(refusal(ask(request("none", &["a"], &["diff"])).await).0, Code::Internal);
    let dashed = request("main", &["a"], &["--output=x"]);
    assert_eq!(refusal(ask(dashed).await), dash("check attr: start check-attr command: "));

    let info = async |repository: &Repository| {
        let request = GetInfoAttributesRequest { repository: Some(repository.clone()) };
        all(node.repositories().get_info_attributes(request).await).await.unwrap()
    };
    assert_eq!(info(&repository).await[0].attributes, attributes.as_bytes());
    let empty = node.create("empty.git").await;
    let nothing = info(&empty).await;
    assert_eq!((nothing.len(), nothing[0].attributes.len()), (1, 0));
}

#[tokio::test]
async fn how_much_space_revisions_take() {
    let node = TestNode::start().await;
    let repository = seed::repository(&node, "a.git").await;
    let request = |repository: Option<&Repository>, revisions: &[&str]| ObjectsSizeRequest {
        repository: repository.cloned(),
        revisions: revisions.iter().map(|name| name.as_bytes().to_vec()).collect(),
    };
    let size = async |requests: Vec<ObjectsSizeRequest>| {
        let requests = tokio_stream::iter(requests);
        node.repositories().objects_size(requests).await.map(|answer| answer.into_inner().size)
    };
    let some = Some(&repository);
    let whole = size(vec![request(some, &["--all"])]).await.unwrap();
    let first = size(vec![request(some, &["side"])]).await.unwrap();
    let rest = size(vec![request(some, &["main"]), request(None, &["v2", "^side"])]).await.unwrap();
    assert!(first > 0 && first < whole && first + rest == whole, "{first} {rest} {whole}");
    assert_eq!(size(vec![request(some, &["--not", "main"])]).await.unwrap(), 0);
    assert_eq!(refusal(size(vec![]).await), (Code::Internal, "receiving initial request: EOF".to_owned()));
    for (requests, answer) in [
        (vec![request(None, &["main"])], invalid("repository not set")),
        (vec![request(some, &[])], invalid("no revisions specified")),
        (vec![request(some, &["main"]), request(None, &[])], invalid("no revisions specified")),
        (
            vec![request(some, &["main"]), request(some, &["main"])],
            invalid("subsequent requests must not contain repository"),
        ),
        (vec![request(some, &["--output=x"])], invalid("validating revision: revision can't start with '-'")),
        (vec![request(some, &["none"])], (Code::NotFound, "revision not found".to_owned())),
    ] {
        assert_eq!(refusal(size(requests).await), answer);
    }
}

#[tokio::test]
async fn bundles_of_some_references_and_exports() {
    let node = TestNode::start().await;
    let repository = seed::repository(&node, "a.git").await;
    let empty = node.create("empty.git").await;
    let request = |repository: Option<&Repository>, patterns: &[&str]| CreateBundleFromRefListRequest {
        repository: repository.cloned(),
        patterns: patterns.iter().map(|pattern| pattern.as_bytes().to_vec()).collect(),
    };
    let bundle = async |requests: Vec<CreateBundleFromRefListRequest>| {
        let requests = tokio_stream::iter(requests);
        let messages = all(node.repositories().create_bundle_from_ref_list(requests).await).await?;
        Ok::<Vec<u8>, Status>(messages.into_iter().flat_map(|message| message.data).collect())
    };
    let some = Some(&repository);
    let made = bundle(vec![
        request(some, &["refs/heads/side", "refs/heads/none"]),
        request(None, &["refs/tags/v2"]),
    ]);
    let file = node.path("bundle");
    std::fs::write(&file, made.await.unwrap()).unwrap();
    let heads = git(&node.root(), &["bundle", "list-heads", "bundle"]);
    let names: Vec<&str> = heads.lines().map(|line| line.split(' ').nth(1).unwrap()).collect();
    assert_eq!(names, ["refs/heads/side", "refs/tags/v2"]);
    std::fs::remove_file(file).unwrap();
    let refused = (Code::FailedPrecondition, "create bundle: refusing to create empty bundle".to_owned());
    assert_eq!(refusal(bundle(vec![request(some, &["refs/heads/none"])]).await), refused);
    assert_eq!(refusal(bundle(vec![request(Some(&empty), &["--all"])]).await), refused);
    assert_eq!(refusal(bundle(vec![request(None, &["main"])]).await), invalid("repository not set"));
    let whole = CreateBundleRequest { repository: Some(empty.clone()) };
    assert_eq!(refusal(all(node.repositories().create_bundle(whole).await).await), refused);

    let export = async |repository: Option<&Repository>| {
        let request = FastExportRequest { repository: repository.cloned() };
        let messages = all(node.repositories().fast_export(request).await).await?;
        Ok::<Vec<u8>, Status>(messages.into_iter().flat_map(|message| message.data).collect())
    };
    let stream = export(some).await.unwrap();
    let mut import = git_command(&node.path("empty.git"));
    let mut import = import.args(["fast-import", "--quiet"]).stdin(Stdio::piped()).spawn().unwrap();
    std::io::Write::write_all(&mut import.stdin.take().unwrap(), &stream).unwrap();
    assert!(import.wait().unwrap().success());
    assert_eq!(id(&node, "empty.git", "main"), id(&node, "a.git", "main"));
    assert_eq!(export(Some(&node.create("bare.git").await)).await.unwrap(), b"");
    assert_eq!(refusal(export(None).await), invalid("repository is not set"));
}

#[tokio::test]
async fn what_git_keeps_to_be_faster_is_told_of() {
    let node = TestNode::start().await;
    let repository = seed::repository(&node, "a.git").await;
    let path = node.path("a.git");
    let ask = async || {
        let request = RepositoryInfoRequest { repository: Some(repository.clone()) };
        node.repositories().repository_info(request).await.unwrap().into_inner()
    };
    let before = ask().await;
    assert_eq!((before.commit_graph, before.bitmap, before.multi_pack_index), (None, None, None));
    assert_eq!(before.last_full_repack, None);
    git(&path, &["-c", "pack.writeBitmapHashCache=true", "repack", "-adbq"]);
    git(&path, &["commit-graph", "write", "--reachable", "--changed-paths", "--split"]);
    std::fs::write(path.join(".gitaly-full-repack-timestamp"), "").unwrap();
    let packed = ask().await;
    let graph = packed.commit_graph.unwrap();
    assert_eq!(
        (graph.commit_graph_chain_length, graph.has_bloom_filters, graph.has_generation_data),
        (1, true, true)
    );
    let bitmap = packed.bitmap.unwrap();
    assert_eq!((bitmap.version, bitmap.has_hash_cache), (1, true));
    assert!(packed.last_full_repack.unwrap().seconds > 1_700_000_000);
    git(&path, &["multi-pack-index", "write", "--bitmap"]);
    let indexed = ask().await;
    let index = indexed.multi_pack_index.unwrap();
    assert_eq!((index.version, index.packfile_count, index.has_reverse_index), (1, 1, true));
    assert_eq!(indexed.multi_pack_index_bitmap.unwrap().version, 1);
}

#[tokio::test]
async fn the_license_of_the_default_branch() {
    let node = TestNode::start().await;
    let mit = include_str!("../../../../LICENSE-MIT");
    let apache = include_str!("../../../../LICENSE-APACHE");
    let find = async |path: &str, files: &[(&str, &str)]| {
        let repository = node.create(path).await;
        let mut stream = b"commit refs/heads/main\ncommitter A <a@x> 1 +0000\ndata 1\nm\n".to_vec();
        for (name, content) in files {
            stream.extend(format!("M 100644 inline {name}\ndata {}\n{content}\n", content.len()).bytes());
        }
        seed::fast_import(&node.path(path), &stream);
        let request = FindLicenseRequest { repository: Some(repository) };
        let found = node.repositories().find_license(request).await.unwrap().into_inner();
        (found.license_short_name, found.license_path, found.license_name)
    };
    let told = |short: &str, path: &str, name: &str| (short.to_owned(), path.to_owned(), name.to_owned());
    assert_eq!(
        find("a.git", &[("LICENSE", mit), ("README", "x")]).await,
        told("mit", "LICENSE", "MIT License")
    );
    let both = [("LICENSE-3RD-PARTY.md", apache), ("license.txt", mit)];
    assert_eq!(find("b.git", &both).await, told("mit", "license.txt", "MIT License"));
    assert_eq!(
        find("c.git", &both[..1]).await,
        told("apache-2.0", "LICENSE-3RD-PARTY.md", "Apache License 2.0")
    );
    assert_eq!(find("d.git", &[("COPYING", "ours\n")]).await, told("other", "COPYING", "Other"));
    assert_eq!(find("e.git", &[("legal/LICENSE", mit), ("README", mit)]).await, told("", "", ""));
    let empty = node.create("f.git").await;
    let found =
        node.repositories().find_license(FindLicenseRequest { repository: Some(empty) }).await.unwrap();
    assert_eq!(found.into_inner(), FindLicenseResponse::default());
    let nobody = node.repositories().find_license(FindLicenseRequest { repository: None }).await;
    assert_eq!(refusal(nobody), invalid("repository not set"));
}

#[tokio::test]
async fn what_is_borrowed_from_a_pool_counts_as_its_own() {
    let node = TestNode::start().await;
    let pool = format!("@pools/ab/cd/abcd{}.git", "0".repeat(60));
    seed::repository(&node, &pool).await;
    git(&node.path(&pool), &["repack", "-adbq"]);
    let ask = async |path: &str| {
        let request = RepositoryInfoRequest { repository: Some(node.named(path)) };
        node.repositories().repository_info(request).await.unwrap().into_inner()
    };
    let shared = ask(&pool).await;
    assert!(shared.is_object_pool && shared.bitmap.is_some() && shared.alternates.is_none());
    node.create("a.git").await;
    let own = ask("a.git").await;
    assert!(!own.is_object_pool && own.bitmap.is_none());
    let alternates = node.path("a.git/objects/info/alternates");
    std::fs::create_dir_all(alternates.parent().unwrap()).unwrap();
    std::fs::write(&alternates, format!("../../{pool}/objects\n")).unwrap();
    let member = ask("a.git").await;
    let (shared_objects, member_objects) = (shared.objects.unwrap(), member.objects.unwrap());
    assert_eq!((member_objects.packfile_count, member_objects.size), (1, shared_objects.size));
    assert!(member_objects.size > 0 && member_objects.recent_size == member_objects.size);
    assert!(member.bitmap.is_some() && !member.is_object_pool && member.size > shared.size);
    assert_eq!(member.alternates.unwrap().object_directories, [format!("../../{pool}/objects")]);
    // What leads out of the storage is not looked at.
    std::fs::write(&alternates, "/usr/objects\n").unwrap();
    assert_eq!(ask("a.git").await.objects.unwrap().packfile_count, 0);
}
