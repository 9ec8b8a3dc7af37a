CREATE TABLE virtual_storages (
    name text PRIMARY KEY,
    default_replication_factor integer NOT NULL CHECK (default_replication_factor >= 0)
);

CREATE TABLE storages (
    virtual_storage text NOT NULL REFERENCES virtual_storages (name),
    name text NOT NULL,
    address text NOT NULL,
    PRIMARY KEY (virtual_storage, name)
);

CREATE SEQUENCE repository_id AS bigint;

CREATE TABLE repositories (
    id bigint PRIMARY KEY,
    virtual_storage text NOT NULL REFERENCES virtual_storages (name),
    -- Byte order, so that pages by name and prefix searches use the index whatever the database's locale is.
    relative_path text COLLATE "C" NOT NULL,
    replica_path text NOT NULL,
    state text NOT NULL CHECK (state IN ('creating', 'ready')),
    primary_storage text NOT NULL,
    generation bigint NOT NULL DEFAULT 0,
    epoch bigint NOT NULL DEFAULT 0,
    home_site text,
    created_at timestamptz NOT NULL DEFAULT now(),
    written_at timestamptz NOT NULL DEFAULT now(),
    UNIQUE (virtual_storage, relative_path)
) WITH (fillfactor = 80);

-- One row per storage that is to hold the repository. `behind` says that `generation` is older than the repository's;
-- whoever writes one writes the other.
CREATE TABLE replicas (
    repository_id bigint NOT NULL REFERENCES repositories (id) ON DELETE CASCADE,
    storage text NOT NULL,
    generation bigint NOT NULL CHECK (generation >= -1),
    behind boolean NOT NULL,
    PRIMARY KEY (repository_id, storage)
) WITH (fillfactor = 80);
CREATE INDEX replicas_behind ON replicas (repository_id, storage) WHERE behind;

CREATE TABLE writes (
    id uuid PRIMARY KEY,
    repository_id bigint NOT NULL REFERENCES repositories (id) ON DELETE CASCADE,
    kind text NOT NULL CHECK (kind IN ('create', 'update')),
    epoch bigint NOT NULL,
    primary_storage text NOT NULL,
    router_id text NOT NULL,
    method text NOT NULL,
    correlation_id text NOT NULL,
    begun_at timestamptz NOT NULL DEFAULT now(),
    expires_at timestamptz NOT NULL
);
CREATE INDEX writes_repository ON writes (repository_id);
CREATE INDEX writes_expiry ON writes (expires_at);

-- The outbox. No foreign key: a duty outlives its repository.
CREATE TABLE duties (
    id uuid PRIMARY KEY DEFAULT gen_random_uuid(),
    kind text NOT NULL CHECK (kind IN ('replicate', 'cleanup', 'notify')),
    -- 0 for a duty that is about no repository.
    repository_id bigint NOT NULL,
    virtual_storage text NOT NULL,
    replica_path text NOT NULL,
    -- Storage, or site for a notification.
    target text NOT NULL,
    state text NOT NULL DEFAULT 'pending' CHECK (state IN ('pending', 'published', 'started', 'done', 'parked')),
    publications integer NOT NULL DEFAULT 0,
    attempts integer NOT NULL DEFAULT 0,
    -- Failures that count towards parking.
    failures integer NOT NULL DEFAULT 0,
    worker_id text,
    -- Generation of the source when the present attempt started.
    generation bigint,
    last_error text NOT NULL DEFAULT '',
    correlation_id text NOT NULL DEFAULT '',
    created_at timestamptz NOT NULL DEFAULT now(),
    next_attempt_at timestamptz NOT NULL DEFAULT now(),
    published_at timestamptz,
    started_at timestamptz,
    finished_at timestamptz
) WITH (fillfactor = 70);
CREATE UNIQUE INDEX duties_waiting ON duties (kind, repository_id, target) WHERE state IN ('pending', 'published');
CREATE UNIQUE INDEX duties_started ON duties (kind, repository_id, target) WHERE state = 'started';
CREATE UNIQUE INDEX duties_parked ON duties (kind, repository_id, target) WHERE state = 'parked';
CREATE INDEX duties_pending_due ON duties (next_attempt_at) WHERE state = 'pending';
CREATE INDEX duties_published_at ON duties (published_at) WHERE state IN ('published', 'started');
CREATE INDEX duties_finished_at ON duties (finished_at) WHERE state = 'done';

-- `position` is given out when the log is read, in the order of `id`, by one reader at a time: gapless without making
-- every write of the site wait for the one before it.
CREATE TABLE geo_log (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    position bigint UNIQUE,
    kind text NOT NULL CHECK (kind IN ('created', 'updated', 'renamed', 'deleted')),
    repository_id bigint NOT NULL,
    virtual_storage text NOT NULL,
    relative_path text NOT NULL,
    old_relative_path text NOT NULL DEFAULT '',
    generation bigint NOT NULL,
    recorded_at timestamptz NOT NULL DEFAULT now()
);
CREATE INDEX geo_log_unplaced ON geo_log (id) WHERE position IS NULL;

CREATE TABLE subscribers (
    site text PRIMARY KEY,
    notified_position bigint NOT NULL DEFAULT 0
);

-- The registry of mirrors: what is known of repositories whose home is another site.
CREATE TABLE mirrors (
    virtual_storage text NOT NULL,
    relative_path text COLLATE "C" NOT NULL,
    home_site text NOT NULL,
    state text NOT NULL CHECK (state IN ('pending', 'started', 'synced', 'failed')),
    -- An event arrived while a sync was under way.
    look_again boolean NOT NULL DEFAULT false,
    claim_id uuid,
    claim_expires_at timestamptz,
    worker_id text,
    failures integer NOT NULL DEFAULT 0,
    last_error text NOT NULL DEFAULT '',
    changed_at timestamptz NOT NULL DEFAULT now(),
    synced_at timestamptz,
    PRIMARY KEY (virtual_storage, relative_path)
);
CREATE UNIQUE INDEX mirrors_claim ON mirrors (claim_id);
CREATE INDEX mirrors_unsettled ON mirrors (changed_at) WHERE state <> 'synced';

CREATE TABLE coordinators (
    id text PRIMARY KEY,
    address text NOT NULL,
    lease_until timestamptz NOT NULL,
    -- Set by a peer that could not reach it: it must not extend its lease any more.
    fenced boolean NOT NULL DEFAULT false
);
CREATE INDEX coordinators_lease ON coordinators (lease_until);

-- For the operator's eyes only; nothing is decided by it.
CREATE TABLE routers (
    router_id text PRIMARY KEY,
    coordinator_id text NOT NULL REFERENCES coordinators (id) ON DELETE CASCADE
);

-- Route revocations that a committed change owes and that nobody has confirmed yet.
CREATE TABLE revocations (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    repository_id bigint NOT NULL,
    virtual_storage text NOT NULL,
    relative_path text NOT NULL,
    generation bigint NOT NULL,
    owed_since timestamptz NOT NULL DEFAULT now()
);
CREATE INDEX revocations_name ON revocations (virtual_storage, relative_path);
CREATE INDEX revocations_owed_since ON revocations (owed_since);
