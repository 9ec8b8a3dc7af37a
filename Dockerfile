# One image with every binary; docker-compose.yml and the manifests choose which one runs.
FROM rust:1.95-bookworm AS build
WORKDIR /source
COPY . .
RUN cargo build --release --locked --bins \
    && mkdir /binaries \
    && find target/release -maxdepth 1 -type f -executable -name 'tabularium*' -exec cp {} /binaries/ \;

FROM debian:bookworm-slim
RUN apt-get update \
    && apt-get install -y --no-install-recommends git git-filter-repo ca-certificates bzip2 \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --system --home-dir /var/lib/tabularium --create-home --uid 985 tabularium
COPY --from=build /binaries/ /usr/local/bin/
USER tabularium
WORKDIR /var/lib/tabularium
