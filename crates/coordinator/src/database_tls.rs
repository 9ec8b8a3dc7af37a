//! How the connection to Postgres is secured: the `[database_tls]` table, in the words of libpq.

use std::path::PathBuf;

use serde::Deserialize;
use sqlx::{
    Connection as _, PgConnection,
    postgres::{PgConnectOptions, PgSslMode},
};
use tabularium_common::{
    config::Fault,
    tls::{check_authorities, check_pair},
};

/// What is asked of Postgres, and shown to it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct DatabaseTls {
    /// Absent: what the URL or the environment of libpq says, else `prefer`.
    pub sslmode: Option<SslMode>,
    /// PEM file: authorities of the server, beside the system's.
    pub sslrootcert: Option<PathBuf>,
    /// PEM file: the certificate that we show.
    pub sslcert: Option<PathBuf>,
    /// PEM file: its private key.
    pub sslkey: Option<PathBuf>,
}

/// libpq's `sslmode`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum SslMode {
    /// Never TLS.
    Disable,
    /// TLS if the server refuses to do without; its certificate is not looked at. Found out when the process starts.
    Allow,
    /// TLS if the server has it; its certificate is not looked at.
    Prefer,
    /// TLS. The certificate is looked at when `sslrootcert` is there.
    Require,
    /// TLS with a certificate of an authority that we believe.
    VerifyCa,
    /// The same, and it has to be that of the host in the URL.
    VerifyFull,
}

impl DatabaseTls {
    /// What cannot be used of it. Reads every file.
    pub(crate) fn faults(&self) -> Vec<Fault> {
        let key = |key: &str| format!("database_tls.{key}");
        let mut faults =
            check_pair((&key("sslcert"), self.sslcert.as_deref()), (&key("sslkey"), self.sslkey.as_deref()));
        faults.extend(
            self.sslrootcert.as_deref().and_then(|path| check_authorities(&key("sslrootcert"), path)),
        );
        faults
    }

    /// The driver's options with all of it in them.
    pub(crate) fn apply(&self, mut options: PgConnectOptions) -> PgConnectOptions {
        // As libpq has it: there is no TLS on a socket file, whatever is asked for.
        if options.get_socket().is_some() || options.get_host().starts_with('/') {
            return options.ssl_mode(PgSslMode::Disable);
        }
        if let Some(mode) = self.sslmode {
            options = options.ssl_mode(match mode {
                SslMode::Disable => PgSslMode::Disable,
                // Nothing that the driver does: see `settled`.
                SslMode::Allow => PgSslMode::Allow,
                SslMode::Prefer => PgSslMode::Prefer,
                SslMode::Require if self.sslrootcert.is_some() => PgSslMode::VerifyCa,
                SslMode::Require => PgSslMode::Require,
                SslMode::VerifyCa => PgSslMode::VerifyCa,
                SslMode::VerifyFull => PgSslMode::VerifyFull,
            });
        }
        if let Some(path) = &self.sslrootcert {
            options = options.ssl_root_cert(path);
        }
        if let (Some(certificate), Some(key)) = (&self.sslcert, &self.sslkey) {
            options = options.ssl_client_cert(certificate).ssl_client_key(key);
        }
        options
    }
}

/// The same options without `allow`, which the driver takes for `disable`: the server is asked whether it has us without TLS, and
/// TLS it is when it has not. As with libpq, any refusal will do.
pub(crate) async fn settled(options: PgConnectOptions) -> Result<PgConnectOptions, sqlx::Error> {
    if !matches!(options.get_ssl_mode(), PgSslMode::Allow) {
        return Ok(options);
    }
    let plain = options.clone().ssl_mode(PgSslMode::Disable);
    match PgConnection::connect_with(&plain).await {
        Ok(connection) => {
            connection.close().await?;
            Ok(plain)
        }
        Err(error) if error.as_database_error().is_some() => {
            tracing::debug!(%error, "the database is asked once more, over TLS");
            Ok(options.ssl_mode(PgSslMode::Require))
        }
        Err(error) => Err(error),
    }
}
