# pve-backup-access try-provider accepts correct providers, and says what is wrong with others. Each takes some
# seconds, so a plain run has only a part of the faulty providers that work at all, chosen by a seed.

use v5.36;

use FindBin;
use lib "$FindBin::Bin/lib";

use File::Path qw(make_path);
use File::Temp ();
use List::Util qw(shuffle);
use TAP::Parser;
use Test::More;

use PBA::Test::Command qw(command run_command start_on_terminal);

my $class = 'PBA::Test::RawProvider';
my @include = ('-I', "$FindBin::Bin/lib");

# { failed => { test name => 1 }, ok => { name of a test that passed => 1 }, passed => number, status, err }
sub try_it ($class, @options) {
    my $run = run_command('try-provider', $class, @include, @options);
    my $parser = TAP::Parser->new({ tap => $run->{out} });
    my %tried = (failed => {}, ok => {}, passed => 0, $run->%{qw(status err)});
    while (my $result = $parser->next) {
        next if !$result->is_test;
        $tried{passed}++ if $result->is_ok;
        my $kind = $result->is_ok ? 'ok' : 'failed';
        $tried{$kind}{ $result->description =~ s/\A- //r } = 1 if !$result->has_skip;
    }
    is_deeply([$parser->parse_errors], [], 'the output is valid TAP');
    return \%tried;
}

my $at_least = 140;

sub passes ($name, $class, @options) {
    my $tried = try_it($class, @options);
    is_deeply([sort keys $tried->{failed}->%*], [], "$name: nothing is wrong");
    cmp_ok($tried->{passed}, '>=', $at_least, "$name: all tests were made");
    is($tried->{status}, 0, "$name: exit status");
    is($tried->{err}, '', "$name: nothing to explain") or diag($tried->{err});
}

# Each of these tests must fail, with an explanation that matches the pattern.
sub fails ($faults, %expected) {
    my @options = (delete($expected{options}) // [])->@*;
    my $tried = try_it($class, '--scfg', "faults=$faults", @options);
    is($tried->{status}, 1, "$faults: exit status");
    for my $name (sort keys %expected) {
        ok($tried->{failed}{$name}, "$faults: '$name' fails")
            or diag(join("\n", sort keys $tried->{failed}->%*));
        like($tried->{err}, qr/^# \Q$name\E: .*$expected{$name}/m, "$faults: '$name' is explained");
    }
    return $tried;
}

# Correct providers that name archives by the second, as all real ones do; some do not know the size of an
# archive.
passes('nbd', $class, '--scfg', 'faults=by second,size zero,slow start,tainted name');
passes(
    'file-handle, in the file of a storage plugin', 'PBA::Test::ProviderOfPlugin',
    '--storage-plugin', 'PBA::Test::RawPlugin'
) if -e '/dev/fuse';

# Providers that do not work at all.
fails('new dies', new => qr/died: the server is down/);
{
    my $tried = try_it('PBA::Test::NoSuchProvider');
    ok($tried->{failed}{'PBA::Test::NoSuchProvider can be loaded'}, 'a class that does not exist');
    like($tried->{err}, qr/-I\b/, 'no such class: the hint');
    ok(!try_it('No::Such; die')->{passed}, 'no name of a class');
    my $base = try_it('PVE::BackupProvider::Plugin::Base');
    ok($base->{failed}{new}, 'a class without methods of its own');
    like(
        $base->{err},
        qr/^# \S+ has every method of the API: it lacks new provider_name job_init /m,
        'a class without methods of its own: the missing methods are named'
    );
    my $plugin
        = try_it($class, '--storage-plugin', 'PBA::Test::RawPlugin', qw(--scfg), 'another one=1');
    ok($plugin->{failed}{new}, 'a storage plugin that makes another provider');
    like(
        $plugin->{err},
        qr/returned no \Q$class\E/,
        'a storage plugin that makes another provider: the error says why'
    );
}

# Sources of Proxmox VE that cannot be loaded without a cluster.
{
    my $dir = File::Temp->newdir('pba-sources-XXXXXXXX', TMPDIR => 1);
    make_path("$dir/PVE/Storage");
    open(my $fh, '>', "$dir/PVE/Storage/DirPlugin.pm") or die "DirPlugin: $!\n";
    say {$fh} 'use PVE::NoCluster; 1;';
    close($fh) or die "DirPlugin: $!\n";
    my $tried = try_it($class, '-I', "$dir", '--scfg', 'faults=new dies');
    ok(
        $tried->{ok}{"$class has every method of the API"},
        'sources without a cluster: the provider is tested'
    );
}

# A provider that cannot restore.
{
    my $lacks = try_it('PBA::Test::BackupOnly');
    like(
        $lacks->{err},
        qr/every method of the API: it lacks restore_get_mechanism /,
        'a provider that cannot restore'
    );
}

# ---- providers that work, but incorrectly ----

# Wrong answers, several at a time if they do not hide each other; then wrong data; then correct but unusual
# behaviour.
my @rows = (
    sub {
        fails(
            'provider_name lies,backup_get_mechanism lies,job_cleanup dies',
            'provider: provider_name' => qr/must return a name, not a reference to scalar/,
            'full backup: backup_get_mechanism' => qr/must return 'nbd' or 'file-handle'/,
            'full backup: job_cleanup' => qr/died: job_cleanup says no/,
            options => ['--backup-only'],
        );
    },
    sub {
        my $tried = fails('job_cleanup dies', 'full backup: job_cleanup' => qr/says no/);
        ok(
            $tried->{ok}
                {'restore of the incremental backup: drive-scsi0 is the disk as of the backup'},
            'job_cleanup dies: the archives exist'
        );
    },
    sub {
        my $tried = fails(
            'backup_vm dies',
            'full backup: backup_vm' => qr/died: backup_vm says no/,
            options => ['--backup-only'],
        );
        ok(
            $tried->{ok}{'full backup: backup_cleanup'},
            'backup_vm dies: backup_cleanup passes its test'
        );
    },
    sub {
        fails(
            'backup_init lies',
            'full backup: backup_init' => qr/a hash with 'archive-name'/,
            options => ['--backup-only'],
        );
    },
    sub {
        fails(
            'backup_vm_query_incremental lies,backup_cleanup dies',
            'full backup: backup_vm_query_incremental' =>
                qr/must return a hash of devices or nothing/,
            'full backup: backup_cleanup' => qr/died: backup_cleanup says no/,
            options => ['--backup-only'],
        );
    },
    sub {
        fails(
            'backup_cleanup lies,backup_handle_log_file dies,restore_get_mechanism lies,'
                . 'archive_get_guest_config lies,archive_get_firewall_config dies,'
                . 'restore_vm_volume_init lies,restore_vm_cleanup dies',
            'full backup: backup_cleanup' => qr/must return \{ stats/,
            'full backup: backup_handle_log_file' => qr/says no/,
            options => ['--backup-only'],
        );
    },
    sub {
        fails(
            'restore_get_mechanism lies,archive_get_guest_config lies,archive_get_firewall_config dies,'
                . 'restore_vm_volume_init lies,restore_vm_cleanup dies',
            'restore of the full backup: restore_get_mechanism' =>
                qr/must return \('qemu-img', 'qemu'\)/,
            'restore of the full backup: archive_get_guest_config' => qr/as it was backed up/,
            'restore of the full backup: archive_get_firewall_config' => qr/says no/,
            'restore of the full backup: restore_vm_volume_init' => qr/with 'qemu-img-path'/,
            'restore of the full backup: restore_vm_cleanup' => qr/says no/,
            'restore of the full backup: drive-scsi0 is the disk as of the backup' =>
                qr/could not be restored/,
        );
    },
    sub {
        fails(
            'not to be shown,only restores,tainted answers',
            'restore of the full backup: archive_get_guest_config' =>
                qr/died: a restore gives no storage/,
            'restore of the full backup: archive_get_firewall_config' =>
                qr/as it was backed up, not undef/,
            'restore of the full backup: restore_vm_init' => qr/size comes from .* is tainted/,
            'restore of the full backup: restore_vm_volume_init' =>
                qr/'qemu-img-path' comes from .* is tainted/,
        );
    },
    sub {
        fails(
            'restore_vm_init lies,serves NBD',
            'restore of the full backup: restore_vm_init' => qr/must return a hash of devices/,
            'restore of the full backup: drive-scsi0 is the disk as of the backup' =>
                qr/must be the path of a file or a block device, not 'nbd\+unix:/,
        );
    },
    sub {
        fails(
            'one name for all guests',
            'full backup: another guest fails before backup_init' =>
                qr/the archive of the guest before it is gone: archive .* is not complete/,
        );
    },
    sub {
        fails(
            'one region only',
            'restore of the incremental backup: drive-scsi0 is the disk as of the backup' =>
                qr/at offset \d+ it has the byte 0x/,
        );
    },
    sub {
        fails(
            'one wrong byte,ignores sizes',
            'restore of the full backup: drive-scsi0 is the disk as of the backup' =>
                qr/at offset 1234567 it has the byte 0x33, the disk had 0x11\b/,
            'restore of the backup of a resized disk: restore_vm_init' =>
                qr/drive-scsi1: size must be/,
        );
    },
    sub {
        fails(
            'reads beyond,no limit',
            'incremental backup: backup_vm' => qr/died: .*reading/,
            options => ['--backup-only'],
        );
    },
    sub {
        fails(
            'insists on use,no limit',
            'incremental backup: the bandwidth limit is kept' =>
                qr/were read in .* with a limit of/,
            'backup after a rollback: backup_vm' => qr/died: there is no bitmap/,
            'backup after a bitmap was lost: backup_vm' => qr/died: there is no bitmap/,
            options => ['--backup-only'],
        );
    },
    sub {
        fails(
            'keeps volumes',
            'full backup: the volumes are let go' => qr/file handle of drive-efidisk0 drive-scsi0/,
            options => ['--backup-only', '--scfg', 'mechanism=file-handle'],
        ) if -e '/dev/fuse';
    },
    sub {
        my $row = 'this process is left as it was';
        my $tried = fails(
            'changes the process,leaves a child',
            "full backup: $row" =>
                qr/standard output was changed, the file mode .*, the handler of SIGTERM .*, the working directory/,
            options => ['--backup-only'],
        );
        like(
            $tried->{err},
            qr/directory was changed, an alarm is set, child process \d+ \(\S+\) still runs$/m,
            'leaves a child: it is named'
        );
        like(
            $tried->{err},
            qr/: standard input was changed, standard output was changed, the file mode/,
            'closes standard streams'
        );
        like($tried->{err}, qr/the input record separator \$\/ was changed/, 'changes $/');
        fails(
            'child returns',
            "full backup: $row" => qr/a forked child returned from backup_vm/,
            options => ['--backup-only'],
        );
    },
    sub {
        fails(
            'cuts regions,size as text',
            'full backup: backup_cleanup' => qr/must return \{ stats/,
            'restore of the full backup: drive-scsi0 is the disk as of the backup' =>
                qr/at offset 65536 it has the byte 0x00/,
        );
    },
    sub {
        fails(
            'swaps devices,longer images',
            'restore of the full backup: drive-scsi0 is the disk as of the backup' =>
                qr/it has \d+ bytes, the disk had 33554432/,
            'restore of the full backup: drive-efidisk0 is the disk as of the backup' =>
                qr/it has \d+ bytes, the disk had 540672/,
        );
    },
    sub {
        fails(
            'needs a firewall,newest configuration',
            'incremental backup after the failure: backup_vm' => qr/died: there is no firewall/,
            'restore of the full backup, at the end: archive_get_guest_config' =>
                qr/as it was backed up, not '#backup of a resized disk /,
        );
    },
    sub {
        fails('removes the last archive',
            'restore of the incremental backup, at the end: restore_vm_init' => qr/not complete/,);
    },
    sub {
        fails(
            'no map',
            'incremental backup: backup_vm' => qr/died: .*reading/,
            options => ['--backup-only'],
        );
    },
    sub {
        fails(
            'errors ignored',
            'failing backup: backup_vm' => qr/returned although its source could not be read/,
            'restore of the incremental backup after the failure: drive-scsi0 is the disk as of the backup'
                => qr/at offset \d+ it has the byte 0x/,
        );
    },
    sub {
        fails(
            'removes what is stored',
            'restore of the incremental backup after the failure: drive-scsi0 is the disk as of the backup'
                => qr/at offset \d+ it has the byte 0x/,
        );
    },
    sub {
        fails(
            'signals ignored',
            'interrupted backup: backup_vm' => qr/returned although a signal was to end it/,
            options => ['--backup-only'],
        );
    },
    sub {
        fails(
            'other text',
            'interrupted backup: backup_vm' =>
                qr/must pass on the exception of a signal handler .* died: cannot store: interrupted/,
            options => ['--backup-only'],
        );
    },
    sub {
        my $run = run_command('try-provider', $class, @include, qw(--scfg faults=exits));
        is($run->{status}, 1, 'exits: exit status');
        like(
            $run->{err},
            qr/^# backup_vm ended this process: it must return or die$/m,
            'exits: it is said'
        );
        unlike($run->{out}, qr/^1\.\./m, 'exits: no plan');
    },
    sub {
        fails(
            'never complete',
            'restore of the full backup: restore_vm_init' => qr/is not complete/,
            'restore of the full backup: drive-scsi0 is the disk as of the backup' =>
                qr/is not complete/,
        );
    },
    sub {
        my $tmp = File::Temp->newdir("pba-Gr\xc3\xb6\xc3\x9fe.XXXXXX", TMPDIR => 1);
        local $ENV{TMPDIR} = "$tmp";    # the directory with the disks
        passes('no bitmaps', $class, '--scfg', 'faults=full only');
    },
    (
        map {
            my $kind = $_;
            sub { passes($kind, 'PBA::Test::OddProvider', '--scfg', "kind=$kind") }
        } qw(gzip single tar)
    ),
);

my ($seed, $share) = (20261128, 2);
if (!$ENV{PBA_FULL}) {
    srand($seed);
    diag("$share of " . @rows . " rows, seed $seed");
    @rows = (shuffle(@rows))[0 .. $share - 1];
}
$_->() for @rows;

# As the author of a plugin runs it.
{
    my $shown = start_on_terminal(80, 'try-provider', $class, @include, '--backup-only')->finish;
    is($shown->{status}, 0, 'on a terminal: exit status');
    like($shown->{out}, qr/^ok 1 - .*^1\.\.[0-9]+\r$/ms, 'on a terminal: TAP');
    unlike($shown->{out}, qr/^not ok|\e/m, 'on a terminal: TAP only');
    my $qemu = $ENV{PBA_QEMU} // 'qemu-system-x86_64';
    my $is_old = qx($qemu --version) =~ m/version [0-9]\./;
    is(scalar($shown->{out} =~ m/reading single clusters of 64 KiB, as this QEMU/),
        $is_old, 'an old QEMU: how others have to read it');
    my $exec = join(' ', command('try-provider', @include, '--backup-only'));
    my $output = `prove --exec '$exec' PBA::Test::BackupOnly 2>&1`;
    is($?, 0, 'prove can run it') or diag($output);
    like($output, qr/^Files=1, Tests=(?:[5-9][0-9]),.*^Result: PASS$/ms, 'prove reports success');
}

done_testing;
