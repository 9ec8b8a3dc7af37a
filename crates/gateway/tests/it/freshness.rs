//! How new a repository is, in HTTP headers.

use tonic::Status;

use crate::stage::Stage;

#[tokio::test(flavor = "multi_thread")]
async fn answers_say_how_new_the_repository_is_and_reads_ask_for_no_less() {
    let stage = Stage::new().await;
    stage.seed("g/p.git", 1, 0).await;
    let request = "GET /g/p.git/info/refs?service=git-upload-pack HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\
                   X-Tabularium-At-Least-Generation: 40\r\nX-Tabularium-Wait: 250\r\n\r\n";
    let answer = stage.raw(request.as_bytes()).await;
    assert_eq!(answer.status, 200);
    assert!(answer.head.contains("x-tabularium-generation: 41"), "{}", answer.head);
    let said = stage.fake.last("InfoRefsUploadPack");
    assert_eq!((&said["tabularium-at-least-generation"][..], &said["tabularium-wait"][..]), ("40", "250"));

    let url = format!("{}/g/p.git", stage.url);
    let asking = "http.extraHeader=X-Tabularium-At-Least-Generation: 39";
    stage.git(&["-c", asking, "clone", "-q", &url, "clone"]).await;
    assert_eq!(stage.fake.last("UploadPack")["tabularium-at-least-generation"], "39");

    let pushing = ["-C", "seed", "push", "-q", &url, "HEAD:refs/heads/new"];
    let pushed = stage.git_command(&pushing).env("GIT_CURL_VERBOSE", "1").output().await.unwrap();
    let verbose = String::from_utf8_lossy(&pushed.stderr).to_lowercase();
    assert!(pushed.status.success() && verbose.contains("x-tabularium-generation: 42"), "{verbose}");

    // What is not there is no answer.
    let older =
        Status::failed_precondition("the repository is at generation 5 here, and at least 40 was asked for");
    stage.fake.failures.lock().unwrap().insert("InfoRefsUploadPack", older);
    let refused = stage.raw(request.as_bytes()).await;
    assert!((400..500).contains(&refused.status), "{}", refused.status);
    assert!(refused.text().contains("at least 40 was asked for"), "{}", refused.text());
}
