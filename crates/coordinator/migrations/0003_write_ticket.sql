-- One write per repository at a time: its row is the repository's write ticket.
--
-- The previous binary may run on: what it leaves out has a default. Two things it does differently until it is replaced.
-- A second write to a repository that is being written is refused by the index with INTERNAL, where it used to run beside
-- the first; and a write in doubt that it settles is judged by its primary alone, as it always did.
ALTER TABLE writes
    -- Storages that were told to take part, the primary first. Empty: only the primary was.
    ADD COLUMN participants text[] NOT NULL DEFAULT '{}',
    -- When somebody last began to settle it. From then on its router can neither renew nor commit it.
    ADD COLUMN settling_since timestamptz,
    DROP CONSTRAINT writes_kind_check,
    -- `repair`: nobody writes while a copy is made equal; the row's id is the duty's.
    ADD CONSTRAINT writes_kind_check CHECK (kind IN ('create', 'update', 'repair'));

-- Of several that are open, the last one stays. The others cannot be recorded any more, and are looked at again.
WITH beside AS (
    DELETE FROM writes w
    WHERE EXISTS (SELECT FROM writes later WHERE later.repository_id = w.repository_id AND later.id > w.id)
    RETURNING id, repository_id, primary_storage, router_id
)
INSERT INTO ended_writes (id, repository_id, storage, router_id, outcome, doubtful, generation)
SELECT id, repository_id, primary_storage, router_id, 'settled', true, -1 FROM beside;

DROP INDEX writes_repository;
CREATE UNIQUE INDEX writes_ticket ON writes (repository_id);

-- The epoch that its router was, or is to be, told. `storage` is the primary after the write.
ALTER TABLE ended_writes ADD COLUMN epoch bigint NOT NULL DEFAULT 0;

-- How many replicas must have a write before it is acknowledged.
ALTER TABLE virtual_storages
    ADD COLUMN write_quorum text NOT NULL DEFAULT 'majority' CHECK (write_quorum IN ('majority', 'available'));
-- Null: as the virtual storage says.
ALTER TABLE repositories ADD COLUMN write_quorum text CHECK (write_quorum IN ('majority', 'available'));
