-- Four roles for a PostgreSQL that several people and machines share, each with what its commands need and no more:
--
--   batchmill_migrator  owns the tables: `batchmill db upgrade`
--   batchmill_producer  submit, cancel, retry, wait and everything that reads
--   batchmill_worker    batchmill worker
--   batchmill_reader    status, jobs, results: SELECT alone
--
-- Run it as the database's owner or a superuser, in the database: once before the first `batchmill db upgrade`,
-- and again after each. Running it twice does no harm. It sets no password: give each role one by psql's \password,
-- which sends it hashed.

DO $roles$
DECLARE
    each_role text;
    each_right record;
    each_sequence text;
BEGIN
    FOREACH each_role IN ARRAY ARRAY['batchmill_migrator', 'batchmill_producer', 'batchmill_worker', 'batchmill_reader']
    LOOP
        IF NOT EXISTS (SELECT FROM pg_roles WHERE rolname = each_role) THEN
            EXECUTE format('CREATE ROLE %I LOGIN', each_role);
        END IF;
        EXECUTE format('GRANT CONNECT ON DATABASE %I TO %I', current_database(), each_role);
        EXECUTE format('GRANT USAGE ON SCHEMA public TO %I', each_role);
    END LOOP;

    -- Nobody else connects, and the migrator alone makes tables; both hold by default for any role otherwise.
    EXECUTE format('REVOKE ALL ON DATABASE %I FROM PUBLIC', current_database());
    REVOKE CREATE ON SCHEMA public FROM PUBLIC;
    GRANT CREATE ON SCHEMA public TO batchmill_migrator;

    FOR each_right IN
        SELECT * FROM (VALUES
            -- A producer deletes what it could not load to the end, and the outputs of requests that it runs again.
            -- Its commands take back long expired leases, which ends runs.
            ('batchmill_producer', 'alembic_version', 'SELECT'),
            ('batchmill_producer', 'jobs',            'SELECT, INSERT, UPDATE, DELETE'),
            ('batchmill_producer', 'batches',         'SELECT, INSERT, UPDATE, DELETE'),
            ('batchmill_producer', 'requests',        'SELECT, INSERT, UPDATE, DELETE'),
            ('batchmill_producer', 'outputs',         'SELECT, INSERT, DELETE'),
            ('batchmill_producer', 'runs',            'SELECT, UPDATE'),
            ('batchmill_producer', 'stores',          'SELECT'),
            ('batchmill_producer', 'workers',         'SELECT'),
            ('batchmill_producer', 'capacities',      'SELECT'),
            ('batchmill_producer', 'evaluations',     'SELECT'),
            -- A worker's reconciler deletes jobs whose submit died half-way; an output is never changed nor deleted.
            -- It puts the suspects of a crash into batches of their own.
            ('batchmill_worker',   'alembic_version', 'SELECT'),
            ('batchmill_worker',   'jobs',            'SELECT, UPDATE, DELETE'),
            ('batchmill_worker',   'batches',         'SELECT, INSERT, UPDATE, DELETE'),
            ('batchmill_worker',   'requests',        'SELECT, UPDATE, DELETE'),
            ('batchmill_worker',   'outputs',         'SELECT, INSERT'),
            ('batchmill_worker',   'runs',            'SELECT, INSERT, UPDATE'),
            ('batchmill_worker',   'stores',          'SELECT'),
            ('batchmill_worker',   'workers',         'SELECT, INSERT, UPDATE'),
            ('batchmill_worker',   'capacities',      'SELECT, INSERT, UPDATE'),
            ('batchmill_worker',   'evaluations',     'SELECT, INSERT'),
            ('batchmill_reader',   'alembic_version', 'SELECT'),
            ('batchmill_reader',   'jobs',            'SELECT'),
            ('batchmill_reader',   'batches',         'SELECT'),
            ('batchmill_reader',   'requests',        'SELECT'),
            ('batchmill_reader',   'outputs',         'SELECT'),
            ('batchmill_reader',   'runs',            'SELECT'),
            ('batchmill_reader',   'stores',          'SELECT'),
            ('batchmill_reader',   'workers',         'SELECT'),
            ('batchmill_reader',   'capacities',      'SELECT'),
            ('batchmill_reader',   'evaluations',     'SELECT')
        ) AS rights (grantee, relation, privileges)
    LOOP
        -- Before the first upgrade there are no tables yet.
        CONTINUE WHEN to_regclass('public.' || each_right.relation) IS NULL;
        EXECUTE format('REVOKE ALL ON public.%I FROM %I', each_right.relation, each_right.grantee);
        EXECUTE format('GRANT %s ON public.%I TO %I', each_right.privileges, each_right.relation, each_right.grantee);
        -- Who inserts takes numbers from the sequence of a table that has one.
        IF each_right.privileges LIKE '%INSERT%' AND EXISTS (
            SELECT FROM information_schema.columns
            WHERE table_schema = 'public' AND table_name = each_right.relation AND column_name = 'id'
        ) THEN
            each_sequence := pg_get_serial_sequence('public.' || each_right.relation, 'id');
            IF each_sequence IS NOT NULL THEN
                EXECUTE format('GRANT USAGE ON SEQUENCE %s TO %I', each_sequence, each_right.grantee);
            END IF;
        END IF;
    END LOOP;
END
$roles$;
