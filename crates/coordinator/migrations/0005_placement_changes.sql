-- Storages and replicas come and go while clients work.
--
-- The previous binary may run on: every column has a default, and what it does not know of it does not do: it takes a
-- storage that is drained for one like any other, and counts a replica that is being made towards the write quorum.
ALTER TABLE storages
    -- `draining`: its replicas move away, and no new ones come. `removed`: not known to routers any more.
    ADD COLUMN state text NOT NULL DEFAULT 'active' CHECK (state IN ('active', 'draining', 'removed')),
    -- By an operator, at run time; new repositories go there though no configuration names it.
    ADD COLUMN added boolean NOT NULL DEFAULT false,
    -- Of the file system that its replicas are on. Null: none was seen yet.
    ADD COLUMN filesystem_id text;

-- Repositories with a greater id are still to be looked at, whether their replicas are where they should be. Null: none.
ALTER TABLE virtual_storages ADD COLUMN placement_cursor bigint;

-- How many storages are to hold it; 0: all. Null: as the virtual storage says.
ALTER TABLE repositories ADD COLUMN replication_factor integer CHECK (replication_factor >= 0);
CREATE INDEX repositories_replica_path ON repositories (replica_path);

ALTER TABLE replicas
    -- Assigned while the repository had others, and not made yet: it does not count towards the write quorum.
    ADD COLUMN joining boolean NOT NULL DEFAULT false,
    -- To be given up as soon as the others are up to date.
    ADD COLUMN leaving boolean NOT NULL DEFAULT false,
    ADD COLUMN behind_since timestamptz,
    -- When it was last found to hold what the other replicas hold.
    ADD COLUMN verified_at timestamptz;
UPDATE replicas SET behind_since = now() WHERE behind;
CREATE INDEX replicas_storage ON replicas (storage, repository_id);
CREATE INDEX replicas_leaving ON replicas (repository_id, storage) WHERE leaving;
CREATE INDEX replicas_verified_at ON replicas (verified_at NULLS FIRST) WHERE NOT behind;

-- What follows from a replica falling behind or catching up, whichever statement says so.
CREATE FUNCTION replica_behind_changed() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF NEW.behind THEN
        NEW.behind_since := now();
    ELSE
        NEW.behind_since := NULL;
        NEW.joining := false;
    END IF;
    RETURN NEW;
END $$;
CREATE TRIGGER replicas_inserted BEFORE INSERT ON replicas
    FOR EACH ROW EXECUTE FUNCTION replica_behind_changed();
CREATE TRIGGER replicas_behind_changed BEFORE UPDATE OF behind ON replicas
    FOR EACH ROW WHEN (OLD.behind IS DISTINCT FROM NEW.behind) EXECUTE FUNCTION replica_behind_changed();
