use std::path::PathBuf;

use super::*;

const TEXT: &[u8] = include_bytes!("../../tests/keys/signed-text");
const WRITTEN: i64 = 1_720_000_000;

fn file(name: &str) -> PathBuf {
    PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/keys")).join(name)
}

fn signing(key: &str, rotated: &[&str]) -> Signing {
    let config = SigningConfig {
        signing_key: file(key),
        rotated_signing_keys: rotated.iter().map(|name| file(name)).collect(),
        committer_name: String::new(),
        committer_email: String::new(),
        sign_unasked: false,
    };
    Signing::read(&config).unwrap()
}

/// Keys that sign, and what Gitaly makes with them.
const KEYS: [(&str, &[u8]); 5] = [
    ("ssh-ed25519", include_bytes!("../../tests/keys/ssh-ed25519.signature")),
    ("ssh-rsa", include_bytes!("../../tests/keys/ssh-rsa.signature")),
    ("openpgp-ed25519", include_bytes!("../../tests/keys/openpgp-ed25519.signature")),
    ("openpgp-rsa", include_bytes!("../../tests/keys/openpgp-rsa.signature")),
    ("openpgp-subkey", include_bytes!("../../tests/keys/openpgp-subkey.signature")),
];

#[test]
fn signatures_are_gitalys() {
    for (key, expected) in KEYS {
        let made = signing(key, &[]).sign(TEXT, WRITTEN).unwrap();
        assert_eq!(String::from_utf8_lossy(&made), String::from_utf8_lossy(expected), "{key}");
    }
}

#[test]
fn signatures_are_known_again_by_their_keys_only() {
    for (key, signature) in KEYS {
        let own = signing(key, &[]);
        // As GetCommitSignatures finds it, and as it stands in a commit.
        for signature in [signature, signature.strip_suffix(b"\n").unwrap()] {
            assert!(own.made(signature, TEXT), "{key}");
        }
        assert!(!own.made(signature, &TEXT[1..]), "{key}: another text");
        assert!(!own.made(&signature[..signature.len() / 2], TEXT), "{key}: half of it");
        for (other, _) in KEYS.iter().filter(|(other, _)| *other != key) {
            assert!(!signing(other, &[]).made(signature, TEXT), "{key} is not {other}");
            assert!(signing(other, &["openpgp-expiring", key]).made(signature, TEXT), "{key} was rotated");
        }
    }
}

#[test]
fn a_signature_that_was_tampered_with_is_nobodys() {
    for (key, signature) in KEYS {
        let own = signing(key, &[]);
        let text = String::from_utf8(signature.to_vec()).unwrap();
        let lines: Vec<&str> = text.lines().collect();
        for number in 0..lines.len() {
            let mut changed = lines.clone();
            let line = changed[number].replace(['A', 'B', 'C'], "x");
            if line == changed[number] || line.starts_with('=') {
                continue;
            }
            changed[number] = &line;
            assert!(!own.made(changed.join("\n").as_bytes(), TEXT), "{key}, line {number}");
        }
    }
}

#[test]
fn files_that_are_no_signing_keys_say_why() {
    let why = |name: &str| Signing::check(&file(name)).unwrap_err().to_string();
    assert_eq!(why("ssh-passphrase"), "it has a passphrase");
    assert_eq!(why("openpgp-passphrase"), "it has a passphrase");
    for (name, kind) in [("ssh-ecdsa", "another one"), ("openpgp-ecdsa", "OpenPGP algorithm 19")] {
        let only = "only Ed25519 and RSA make the same signature on every replica";
        assert_eq!(why(name), format!("its kind is {kind}; {only}"));
    }
    assert_eq!(
        why("signed-text"),
        "it holds neither a private key of OpenSSH nor one of OpenPGP in binary form"
    );
    assert!(why("nothing").starts_with("No such file"), "{}", why("nothing"));
    let empty = tempfile::NamedTempFile::new().unwrap();
    assert_eq!(Signing::check(empty.path()).unwrap_err().to_string(), "no key in it may sign");
}

#[test]
fn half_a_key_is_none() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("key");
    for (name, _) in KEYS {
        let whole = std::fs::read(file(name)).unwrap();
        for length in (0..whole.len().min(400)).step_by(7) {
            std::fs::write(&path, &whole[..length]).unwrap();
            // A user id that lacks its signature leaves a key that may sign.
            let is_key = Signing::check(&path).is_ok();
            assert!(!is_key || name.starts_with("openpgp") && length > 150, "{length} bytes of {name}");
        }
    }
}

#[test]
fn a_key_signs_as_long_as_it_is_valid() {
    const CREATED: i64 = 1_704_067_200;
    let sign = |key: &str, at| signing(key, &[]).sign(TEXT, at).map_err(|error| error.to_string());
    let own = signing("openpgp-expiring", &[]);
    for at in [CREATED, CREATED + 86_400] {
        assert!(own.made(&sign("openpgp-expiring", at).unwrap(), TEXT));
    }
    let late = sign("openpgp-expiring", CREATED + 31 * 86_400).unwrap_err();
    assert_eq!(late, "the signing key is not valid at the commit's time");
    assert_eq!(sign("openpgp-ed25519", i64::MAX).unwrap_err(), late);
    // Whoever picks a commit that is older than the key gets a signature of the key's time.
    assert_eq!(sign("openpgp-ed25519", 0), sign("openpgp-ed25519", CREATED));
    assert_ne!(sign("openpgp-ed25519", CREATED), sign("openpgp-ed25519", CREATED + 1));
    // The other kind has no time.
    assert_eq!(sign("ssh-ed25519", i64::MIN), sign("ssh-ed25519", i64::MAX));
}

#[test]
fn public_keys_are_for_everybody() {
    let public = |key: &str| String::from_utf8(signing(key, &[]).public_key().unwrap()).unwrap();
    let ssh = public("ssh-ed25519");
    assert!(ssh.starts_with("ssh-ed25519 AAAAC3NzaC1lZDI1NTE5") && ssh.ends_with('\n'), "{ssh}");
    for key in ["openpgp-ed25519", "openpgp-rsa", "openpgp-subkey"] {
        let text = public(key);
        let bytes = armor::read_open_pgp(text.as_bytes(), "PGP PUBLIC KEY BLOCK").unwrap();
        let private = std::fs::read(file(key)).unwrap();
        assert!(bytes.len() < private.len());
        let error = OpenPgpKey::parse(&bytes).err().unwrap().to_string();
        assert_eq!(error, "it begins with something else than a private key");
    }
}
