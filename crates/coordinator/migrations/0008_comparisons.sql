-- A comparison of replicas that is under way does not satisfy whoever asks for one meanwhile.
--
-- The previous binary may run on: its comparisons count as they did.
ALTER TABLE replicas
    -- The comparison that may say that this replica is verified. Null: none is under way, or another one was asked for since it began.
    ADD COLUMN comparing uuid;
