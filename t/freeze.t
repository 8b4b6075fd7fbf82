# The hooks around the instant: what is sent between them, that thaw is called on every path after freeze, that
# nothing is left behind, and how long a guest is frozen.

use v5.36;

use FindBin;
use lib "$FindBin::Bin/lib";
use Test::More;
use Time::HiRes qw(ualarm);

use PBA::Test::Backend;
use PBA::Test::QMP;
use PBA::Test::VM;

my $size = 1 << 20;

# Sends commands over a connection of its own and records them. on => { command => code to run before it }.
sub carrier ($backend, $calls, %on) {
    return sub ($command, $arguments) {
        push($calls->@*, $command);
        $on{$command}->() if $on{$command};
        return PBA::Test::QMP->once($backend->qmp_path, $command, $arguments);
    };
}

# Makes one setup. hooks => { freeze, thaw: code }, on => see carrier. Returns the calls and the exception.
sub setup ($backend, %opt) {
    my @calls;
    my $access = $backend->access(
        log => sub { },
        qmp => carrier($backend, \@calls, ($opt{on} // {})->%*),
        ($opt{options} // {})->%*,
    );
    my %hooks = map {
        my $name = $_;
        $name => sub { push(@calls, $name); $opt{hooks}{$name}->($access) if $opt{hooks}{$name} }
    } qw(freeze thaw);
    my $done = eval { $access->setup($opt{devices} // $backend->devices('use'), %hooks); 1 };
    my $error = $@;
    my $is_up = $access->_is_up;
    $access->teardown(0) if $done;
    return { calls => \@calls, error => $done ? undef : $error, is_up => $is_up };
}

# The commands between the two hooks.
sub between ($calls) {
    my $text = join(' ', $calls->@*);
    return $text =~ m/freeze ?(.*?) ?thaw/ ? $1 : "no such hooks: $text";
}

my %frozen = (
    pve => 'query-jobs query-block backup-access-setup',
    upstream => 'query-named-block-nodes blockdev-reopen transaction',
);

# name => the fault, as arguments of setup, and error: the expected exception.
sub cases ($backend, $cut) {
    my $die = sub ($text) {
        return sub (@) { die "$text\n" }
    };
    return (
        'freeze dies' => { hooks => { freeze => $die->('my freeze') }, error => qr/\Amy freeze$/ },
        'thaw dies' => { hooks => { thaw => $die->('my thaw') }, error => qr/\Amy thaw$/ },
        'both die' => {
            hooks => { freeze => $die->('my freeze'), thaw => $die->('my thaw') },
            error => qr/\Amy freeze$/
        },
        'the cut fails' => { on => { $cut => $die->('no cut') }, error => qr/no cut/ },
        'the cut fails and thaw dies' => {
            on => { $cut => $die->('no cut') },
            hooks => { thaw => $die->('my thaw') },
            error => qr/no cut/
        },
        'the look fails' => {
            hooks => { freeze => sub (@) { $backend->{'look fails'} = 1 } },
            on => {
                map {
                    $_ => sub { die "no look\n" if delete($backend->{'look fails'}) }
                } qw(query-block query-jobs query-named-block-nodes)
            },
            error => qr/no look/
        },
        'a signal while it is frozen' => {
            hooks => {
                freeze => sub (@) { ualarm(20_000); select(undef, undef, undef, 1) },
            },
            error => qr/\Amy signal$/
        },
        calls_of_hooks(),
    );
}

# Calls of the access from the hooks of its own setup.
sub calls_of_hooks () {
    my $teardown = sub ($access) { $access->teardown(0) };
    my $volumes = sub ($access) { $access->volumes('nbd') };
    my $setup = sub ($access) { $access->setup([{ device => 'x' }]) };
    return (
        'torn down by the hook' =>
            { hooks => { freeze => $teardown }, error => qr/torn down while it was set up/ },
        (
            map {
                ("exported by $_" => { hooks => { $_ => $volumes }, error => qr/not set up yet/ })
            } qw(freeze thaw)
        ),
        (
            map {
                ("set up by $_" => { hooks => { $_ => $setup }, error => qr/tear it down first/ })
            } qw(freeze thaw)
        ),
    );
}

sub check_paths ($backend, $outside) {
    my $name = $backend->name;
    my $cut = $name eq 'pve' ? 'backup-access-setup' : 'blockdev-reopen';
    my @good = setup($backend);
    is(between($good[0]{calls}), $frozen{$name}, 'between the hooks: only queries and the instant');
    my %cases = cases($backend, $cut);

    local $SIG{ALRM} = sub { die "my signal\n" };
    for my $case (sort keys %cases) {
        my $seen = setup($backend, $cases{$case}->%*);
        my $hooks = join(' ', grep { m/\A(?:freeze|thaw)\z/ } $seen->{calls}->@*);
        is($hooks, 'freeze thaw', "$case: thawed, once");
        like($seen->{error} // 'it did not die', $cases{$case}{error}, "$case: what it dies with");
        ok(!$seen->{is_up}, "$case: no access is active");
        my ($last) = grep { $seen->{calls}[$_] eq 'thaw' } 0 .. $#{ $seen->{calls} };
        my @sent = grep { m/\A(?:blockdev-del|nbd-server-stop|backup-access-teardown)\z/ }
            $seen->{calls}->@[0 .. $last];
        is("@sent", '', "$case: nothing is undone while it is frozen")
            if $case ne 'torn down by the hook';
        is_deeply([$backend->problems($outside)], [], "$case: nothing is left");
    }
    my $seen = setup($backend, devices => [{ device => 'not-there' }]);
    is(join(' ', grep { m/\A(?:freeze|thaw)\z/ } $seen->{calls}->@*),
        '', 'what can be refused before the freeze is refused before it');
    return;
}

# Changes during a freeze that took minutes.
sub check_changes ($backend) {
    my $vm = $backend->vm;
    my $resize = sub (@) { $vm->qmp('block_resize', 'node-name' => 'b', size => 2 * $size) };
    if ($backend->name eq 'pve') {
        my $seen = setup($backend, hooks => { freeze => $resize });

        # A Proxmox QEMU itself refuses this, because of the node that holds the disk.
        my $refused
            = qr/was resized from $size to \d+ bytes while|block_resize.* is (?:busy|in use)/;
        like($seen->{error}, $refused, 'resized');
        ok(!(grep { $_ eq 'backup-access-setup' } $seen->{calls}->@*),
            'resized: the command was not sent');
        is($vm->is_alive, 1, 'resized: the VM lives');
    }
    return;
}

for my $name (PBA::Test::Backend->names) {
    subtest "backend $name" => sub {
        my $backend = PBA::Test::Backend->start_paused(
            name => $name,
            disks => [map { { id => $_, size => $size, bus => 'scsi' } } qw(a b)],
        );
        setup($backend);
        check_paths($backend, $backend->outside);
        check_changes($backend);
        $backend->check_manners;
    };
}

done_testing;
