//! A relay in front of the database that can be shut or stopped, and remembers every statement that is run through it.

use std::{
    collections::HashMap,
    path::PathBuf,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU8, Ordering},
    },
    time::Duration,
};

use sqlx::postgres::PgConnectOptions;
use tabularium_common::{grpc::Address, lifecycle::Tasks};
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _},
    net::TcpListener,
};
use tokio_util::sync::CancellationToken;

const OPEN: u8 = 0;
const SHUT: u8 = 1;
const STOPPED: u8 = 2;

pub(crate) struct Relay {
    pub(crate) url: String,
    mode: Arc<AtomicU8>,
    cut: Arc<Mutex<CancellationToken>>,
    run: Arc<Mutex<Vec<String>>>,
}

/// Where the server of a URL listens, and the URL with `here` in its place.
fn behind(database: &str, here: &str) -> (Address, String) {
    let options: PgConnectOptions = database.parse().unwrap();
    if let Some(socket) = options.get_socket() {
        let path: PathBuf = socket.join(format!(".s.PGSQL.{}", options.get_port()));
        let (user, name) = (options.get_username(), options.get_database().unwrap());
        return (Address::Unix(path), format!("postgres://{user}@{here}/{name}?sslmode=disable"));
    }
    let target = format!("{}:{}", options.get_host(), options.get_port());
    (Address::Tcp(target.clone()), database.replace(&target, here))
}

impl Relay {
    pub(crate) async fn start(database: &str) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let (target, url) = behind(database, &listener.local_addr().unwrap().to_string());
        let relay = Self { url, mode: Arc::default(), cut: Arc::default(), run: Arc::default() };
        let tasks = Tasks::new();
        let (mode, cut, run) = (Arc::clone(&relay.mode), Arc::clone(&relay.cut), Arc::clone(&relay.run));
        tasks.clone().spawn("relay", async move {
            loop {
                let (near, _) = listener.accept().await.unwrap();
                if mode.load(Ordering::SeqCst) == SHUT {
                    continue;
                }
                let (target, mode, run) = (target.clone(), Arc::clone(&mode), Arc::clone(&run));
                let token = cut.lock().unwrap().clone();
                tasks.spawn("connection", async move {
                    let Ok(far) = target.connect().await else { return };
                    let (near_read, near_write) = near.into_split();
                    let (far_read, far_write) = tokio::io::split(far);
                    let mut listening = Listening::default();
                    tokio::select! {
                        () = copy(near_read, far_write, &mode, |bytes| listening.hear(bytes, &run)) => {}
                        () = copy(far_read, near_write, &mode, |_| {}) => {}
                        () = token.cancelled() => {}
                    }
                });
            }
        });
        relay
    }

    /// Connections are cut and refused.
    pub(crate) fn shut(&self) {
        self.mode.store(SHUT, Ordering::SeqCst);
        let mut cut = self.cut.lock().unwrap();
        cut.cancel();
        *cut = CancellationToken::new();
    }

    /// Connections stand, are accepted, and nothing comes of it.
    pub(crate) fn stop(&self) {
        self.mode.store(STOPPED, Ordering::SeqCst);
    }

    pub(crate) fn open(&self) {
        self.mode.store(OPEN, Ordering::SeqCst);
    }

    /// Every statement run since the last call.
    pub(crate) fn statements(&self) -> Vec<String> {
        std::mem::take(&mut *self.run.lock().unwrap())
    }
}

async fn copy(
    mut from: impl AsyncRead + Unpin,
    mut to: impl AsyncWrite + Unpin,
    mode: &AtomicU8,
    mut hear: impl FnMut(&[u8]),
) {
    let mut buffer = vec![0; 64 * 1024];
    while let Ok(length @ 1..) = from.read(&mut buffer).await {
        while mode.load(Ordering::SeqCst) == STOPPED {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        hear(&buffer[..length]);
        if to.write_all(&buffer[..length]).await.is_err() || to.flush().await.is_err() {
            return;
        }
    }
}

/// What a client says, taken apart: `Parse` names a statement, `Bind` runs it.
#[derive(Default)]
struct Listening {
    unread: Vec<u8>,
    greeted: bool,
    named: HashMap<Vec<u8>, String>,
}

impl Listening {
    fn hear(&mut self, bytes: &[u8], run: &Mutex<Vec<String>>) {
        self.unread.extend_from_slice(bytes);
        loop {
            let kind_length = usize::from(self.greeted);
            let Some(length) = self.unread.get(kind_length..kind_length + 4) else { return };
            let length = u32::from_be_bytes(length.try_into().unwrap()) as usize + kind_length;
            if self.unread.len() < length {
                return;
            }
            let message: Vec<u8> = self.unread.drain(..length).collect();
            if !self.greeted {
                // A question for TLS comes before the greeting.
                self.greeted = message.get(4..8) != Some(&80_877_103_u32.to_be_bytes());
                continue;
            }
            let mut texts = message[5..].split(|byte| *byte == 0);
            let mut text = || texts.next().unwrap_or_default().to_vec();
            match message[0] {
                b'P' => {
                    let (name, sql) = (text(), String::from_utf8(text()).unwrap());
                    self.named.insert(name, sql);
                }
                b'B' => {
                    let (_portal, name) = (text(), text());
                    run.lock().unwrap().push(self.named.get(&name).cloned().unwrap_or_default());
                }
                b'Q' => run.lock().unwrap().push(String::from_utf8(text()).unwrap()),
                _ => {}
            }
        }
    }
}
