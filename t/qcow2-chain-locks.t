# Qcow2Chain: which operations on one guest's archives can run at the same time, which must wait, and reading
# from read-only storage. Tests each lock of a process with each operation of another one.

use v5.36;

use FindBin;
use lib "$FindBin::Bin/lib";

use POSIX ();
use Test::More;
use Time::HiRes ();

use PBA::Test::Chain;
use PVE::BackupAccess::CLI::Archives;
use PVE::BackupAccess::CLI::Restore;
use PVE::BackupAccess::Provider::Store::DirectoryLock qw(drop_lock take_lock try_lock);

my $base = PBA::Test::Chain->new->add_archives(3);
my $store = $base->store;
my @names = $base->names;
my $oldest = $names[0];

sub restore ($provider) {
    $provider->restore_vm_init($names[2]);
    my $file = $base->restored($names[2], 'drive-scsi0');
    $provider->restore_vm_cleanup($names[2]);
    return $file eq $base->{expected}{ $names[2] }{'drive-scsi0'} ? 'right' : 'wrong';
}

# Operation => code that returns its result, or dies.
my %actions = (
    backup => sub ($provider) {
        $provider->backup_init(100, 'qemu', 1_900_000_000);
        $provider->backup_cleanup(100, 'qemu', 0, { error => 'only begun' });
        return 'begun';
    },
    prune => sub ($provider) { return scalar($provider->prune(100, 2)->@*) . ' removed' },
    remove => sub ($provider) { $provider->remove($oldest); return 'removed' },
    verify => sub ($provider) { return join("\n", $provider->verify($names[2])->@*) || 'ok' },
    restore => \&restore,
);
my %good = (
    backup => 'begun',
    prune => '1 removed',
    remove => 'removed',
    verify => 'ok',
    restore => 'right'
);

# The lock of the other process => the operations that must wait. A removal has both of the first.
my %waits = (
    change => [qw(backup prune remove)],
    read => [qw(prune remove)],
    removal => [qw(prune remove restore verify)],
);

# A process that holds the lock until it is told to end, or for that long.
sub hold ($kind, $seconds = undef) {
    pipe(my $ready, my $is_ready) or die "pipe: $!\n";
    pipe(my $told, my $tell) or die "pipe: $!\n";
    my $pid = fork() // die "fork: $!\n";
    if (!$pid) {
        close($tell);
        my $lock = try_lock($base->guest_dir, $kind);
        syswrite($is_ready, $lock ? 'y' : 'n');
        defined($seconds) ? Time::HiRes::sleep($seconds) : sysread($told, my $end, 1);
        POSIX::_exit(0);
    }
    close($is_ready);
    sysread($ready, my $is_held, 1);
    is($is_held, 'y', "$kind is held");
    return sub { close($tell); waitpid($pid, 0) };
}

for my $kind (sort keys %waits) {
    subtest "while another process holds $kind" => sub {
        for my $action (sort keys %actions) {
            $base->use_copy($store);
            my $end = hold($kind);
            my $done = eval { $actions{$action}->($base->provider) };
            my $error = $@;
            $end->();
            if (grep { $_ eq $action } $waits{$kind}->@*) {
                isa_ok($error, 'PVE::BackupAccess::Error', "$action: it dies");
                is($error->{class}, 'StateError', "$action: the class");
                like(
                    $error,
                    qr/ - try again when that has ended, or wait for it \(--wait\)$/m,
                    "$action: the error says why"
                );
                is_deeply([$base->names], \@names, "$action: nothing is changed");
            }
            else {
                is($done, $good{$action}, "$action: continues") or diag($error);
            }
        }
    };
}

subtest 'waiting' => sub {
    for my $kind (sort keys %waits) {
        my ($action) = $waits{$kind}->@*;
        $base->use_copy($store);
        $base->provider->wait_for_others(60);
        my $end = hold($kind, 0.5);
        is(eval { $actions{$action}->($base->provider) }, $good{$action}, "$action, $kind")
            or diag($@);
        $end->();
    }
    for my $bad (undef, '', -1, 'x', 1.5) {
        ok(!eval { $base->provider->wait_for_others($bad); 1 }, 'an invalid number of seconds');
    }
};

# Each lock that an operation takes, even if only for a moment, is taken while others begin.
subtest 'operations that begin in the same moment' => sub {
    my %beside = (
        verify => [qw(verify restore backup)],
        restore => [qw(verify restore backup)],
        backup => [qw(verify restore)],
    );
    for my $action (sort keys %beside) {
        $base->use_copy($store);
        my @failed;
        our $is_inside = 0;
        my $others = sub ($lock) {
            return $lock if $is_inside;
            local $is_inside = 1;
            for my $other ($beside{$action}->@*) {
                my $new = PVE::BackupAccess::Provider::Qcow2Chain->new(undef,
                    { path => $base->store, 'state-dir' => $base->state_dir }, 'test');
                local $base->{provider} = $new;
                push(@failed, "$other: $@") if !eval { $actions{$other}->($new); 1 };
            }
            return $lock;
        };
        no warnings 'redefine';
        local *PVE::BackupAccess::Provider::Store::DirectoryGuest::take_lock
            = sub (@which) { $others->(take_lock(@which)) };
        local *PVE::BackupAccess::Provider::Store::DirectoryGuest::try_lock
            = sub (@which) { $others->(try_lock(@which)) };
        is(eval { $actions{$action}->($base->provider) }, $good{$action}, $action) or diag($@);
        is_deeply(\@failed, [], "$action: the others continue");
    }
};

# A killed removal is not completed while a process reads, and the archives can still be read.
subtest 'a removal that was killed, and a reader' => sub {
    $base->use_copy($store);
    my $archive = $base->path_of($oldest);
    rename("$archive/manifest.json", "$archive/removed.json") or die "rename: $!\n";
    my $end = hold('read');
    is($actions{$_}->($base->provider), $good{$_}, "$_ beside the reader") for qw(verify restore);
    ok(-e "$archive/removed.json", 'the removal waits');
    $end->();
    is($actions{verify}->($base->provider), 'ok', 'verify works after the reader has ended');
    ok(!-e $archive, 'the removal is ended');
};

subtest 'the command looks for digests while it has the lock' => sub {
    $base->use_copy($store);
    my $target = $base->tmp . '/target';
    mkdir($target) or die "mkdir: $!\n";
    my $digests = PVE::BackupAccess::Provider::Store->can('digests');
    my @is_held;
    no warnings 'redefine';
    local *PVE::BackupAccess::Provider::Store::digests = sub (@which) {
        push(@is_held, try_lock($base->guest_dir, 'removal') ? 0 : 1);
        return $digests->(@which);
    };
    my $status
        = PVE::BackupAccess::CLI::Restore::run({ quiet => 1 }, $base->path_of($oldest), $target);
    is_deeply([$status, @is_held], [0, 1, 1], 'for each disk');
};

my $Archives = 'PVE::BackupAccess::CLI::Archives';
sub verify_store ($store) { return $Archives->can('verify')->({}, $store) }

sub prune_store ($store) {
    return $Archives->can('prune')->({ 'keep-last' => 1, wait => 60 }, $store);
}

# What a function of the command prints, and its exit status.
sub said_by ($code) {
    open(my $out, '>', \my $said) or die "open: $!\n";
    open(my $err, '>', \my $warned) or die "open: $!\n";
    local (*STDOUT, *STDERR) = ($out, $err);
    my $status = $code->();
    return ($status, $said // '', $warned // '');
}

# Runs the code, during which another process removes the oldest archive, before or after the first call of the provider's
# method.
sub with_removal ($when, $method, $code) {
    my $class = 'PVE::BackupAccess::Provider::Qcow2Chain';
    my ($real, $left) = ($class->can($method), 1);
    my $remove = sub () { $base->provider->remove($oldest) if $left-- == 1 };
    no strict 'refs';
    no warnings 'redefine';
    local *{"${class}::$method"} = sub (@arguments) {
        $remove->() if $when eq 'before';
        my $result = $real->(@arguments);
        $remove->() if $when eq 'after';
        return $result;
    };
    return said_by($code);
}

subtest 'archives that another process removes during a command' => sub {
    my $copy = $base->use_copy($store);
    my ($status, $said, $warned)
        = with_removal(after => 'list', sub () { verify_store($copy) });
    is($status, 0, 'verify: exit status');
    is($said, join('', map { "$copy/$_: ok\n" } @names[1, 2]), 'verify: the others are in order');
    is($warned, "$copy/$oldest: was removed in the meantime\n", 'verify: it says so');

    $copy = $base->use_copy($store);
    ($status, $said) = with_removal(before => 'prune', sub () { prune_store($copy) });
    is($status, 0, 'prune: exit status');
    is($said, "removed $names[1]\n", 'prune: it prints what it has removed itself');
};

# Between the look at the directory and that at the archive.
subtest 'an archive that is removed during a list' => sub {
    $base->use_copy($store);
    my $real = PVE::BackupAccess::Provider::Store::DirectoryGuest->can('names');
    my $count = 0;
    no warnings 'redefine';
    local *PVE::BackupAccess::Provider::Store::DirectoryGuest::names = sub (@arguments) {
        my @found = $real->(@arguments);
        $base->provider->remove($oldest) if !$count++;
        return @found;
    };
    my $list = $base->provider->list(100);
    is_deeply(
        [map { [$_->@{qw(volname problem)}] } $list->@*],
        [map { [$_, undef] } @names[1, 2]],
        'it is not listed as unusable'
    );
};

subtest 'verify of a store while an archive is removed' => sub {
    my $copy = $base->use_copy($store);
    my $end = hold('removal');
    my ($status, $said) = said_by(sub () { verify_store($copy) });
    $end->();
    is($status, 1, 'exit status');
    like(
        $said,
        qr{\A(?:\Q$copy\E/\S+: not verified\n  \S+ is in use: another process is removing an archive - [^\n]+\n){3}\z},
        'it does not call them damaged'
    );
};

subtest 'where nothing can be written' => sub {
    plan(skip_all => 'needs root to become nobody') if $> != 0;
    my $copy = $base->use_copy($store);
    system('chmod', '-R', 'a+rX', $base->tmp) == 0 or die "chmod: $?\n";
    my $pid = fork() // die "fork: $!\n";
    if (!$pid) {
        ($(, $)) = (65534, '65534 65534');
        ($<, $>) = (65534, 65534);
        my @said = map {
            eval { $actions{$_}->($base->provider) }
                // $@
        } qw(verify);
        POSIX::_exit($said[0] eq 'ok' && !eval { try_lock("$copy/vm/100", 'change'); 1 } ? 0 : 1);
    }
    waitpid($pid, 0);
    is($? >> 8, 0, 'the archive can be verified, but not locked for a change');
};

subtest 'a child that has yet to become its program' => sub {
    my $lock = take_lock("$store/vm/100", 'change', 0);
    pipe(my $from, my $to) or die "pipe: $!\n";
    my $pid = fork() // die "fork: $!\n";
    if (!$pid) {
        close($to);
        sysread($from, my $end, 1);
        POSIX::_exit(0);
    }
    drop_lock($lock);
    ok(try_lock("$store/vm/100", 'change'),
        'a child does not hold a lock that its parent has dropped');
    close($to);
    waitpid($pid, 0);
};

done_testing;
