package PBA::Test::Sweep;

# Backups with one fault each, while the guest writes. After each of them, the guest must still run; recover, or
# the next setup by itself, cleans up; and the next increment on top of the last good backup must equal the
# disk.
#
#   my $sweep = PBA::Test::Sweep->new(backend => $backend, seed => 1);
#   $sweep->run(name => ..., ids => [...], faults => [...], backup => sub ($point, $proxy) { ... });
#
# A row is one kind of backup. Every fault of PBA::Test::QMPProxy happens at each of its places, or at as many
# places as points says (undef: all), chosen by the seed. backup makes the backup through the proxy, and returns
# whether QEMU was told of a success after all data had been read. With ends_clean, a backup leaves nothing
# behind that recover would have to undo.
#
#   $sweep->pair(\%row, { fault => 'lose', at => 7, then => { 9 => 'kill-after' } });
#   $sweep->pair(\%row, { fault => 'kill-before', at => 7, by => 'recover', next => 'drop', next_at => 3 });
#
# A pair adds a second fault: in the same backup, or in the next action of another process: recover, or a backup
# (by => 'setup'). client is the process in which the first backup is made.

use v5.36;

use File::Compare ();
use List::Util qw(min shuffle);
use Test::More ();

use PBA::Test::Client;
use PBA::Test::QMPProxy;
use PBA::Test::Repository;

my $Client = 'PBA::Test::Client';
my $block = 65536;

sub new ($class, %opt) {
    my $self = bless({ %opt, count => 0, writes => 0, outside => $opt{backend}->outside }, $class);
    $self->{repository} //= PBA::Test::Repository->new($opt{backend});
    return $self;
}

sub count ($self) { return $self->{count} }

# How often each action on the bitmaps occurred in the backups after the faults: { action => times }.
sub actions ($self) { return $self->{actions} }
sub backend ($self) { return $self->{backend} }
sub repository ($self) { return $self->{repository} }

sub run ($self, %row) {
    for my $fault ($row{faults}->@*) {
        for my $at ($self->_places($fault, \%row)) {
            my $struck = $self->_point($fault, $at, \%row) // return;
            last if $struck eq '' && !$row{points};
        }
    }
    return;
}

# A backup without a fault shows how many places there are.
sub _places ($self, $fault, $row) {
    return 1 .. 10_000 if !$row->{points};
    my $kind = $fault =~ m/-nbd\z/ ? 'nbd' : 'command';
    my $total = $row->{total}{$kind} //= scalar($self->_backup($fault, 0, $row)->records($kind));
    srand($self->{seed}++ + $self->{backend}->vm->version->[0]);    # different places for each QEMU
    my @places = shuffle(1 .. $total);
    return sort { $a <=> $b } @places[0 .. min($row->{points}, $total) - 1];
}

# All proxies have the same path, so they are one VM for the module.
sub _proxy ($self, %fault) {
    my $backend = $self->{backend};
    return PBA::Test::QMPProxy->start(
        target => $backend->qmp_path,
        listen => $backend->vm->dir . '/proxy.qmp',
        %fault,
    );
}

# Returns the proxy of the backup.
sub _backup ($self, $fault, $at, $row, $then = {}) {
    my @ids = $row->{ids}->@*;
    $self->_before_backup(@ids);
    my $proxy = $self->_proxy(fault => $fault, at => $at, then => $then);
    my $told = $row->{backup}->({ $row->%*, fault => $fault, at => $at }, $proxy);
    $self->{repository}->take_good(@ids) if $told;
    $self->{backend}->guest->stop_churn if !$at;
    $proxy->stop;
    return $proxy;
}

# Writes at offsets that the churn does not use, different ones each time.
sub write_more ($self, @ids) {
    my $backend = $self->{backend};
    for my $id (@ids) {
        my $blocks = $backend->vm->disk($id)->{size} / $block / 2;
        my $number = ++$self->{writes};
        my $offset = ($blocks + $number % $blocks) * $block;
        $backend->guest->write($id, $offset, $block, 1 + $number % 255);
    }
    return;
}

sub _before_backup ($self, @ids) {
    my $backend = $self->{backend};
    my $repository = $self->{repository};
    my @new = grep { !-e $repository->image($_) } @ids;
    $repository->backup(mode => 'new', success => 1, disks => \@new) if @new;
    $self->write_more(@ids);
    $backend->guest->start_churn(
        seed => ++$self->{churns},
        disks => \@ids,
        blocks => $backend->vm->disk($ids[0])->{size} / 4096 / 2,
        pause_us => 10_000,
    );
    return;
}

# Returns the command at which the fault happened, '' for none, or undef if something is wrong.
sub _point ($self, $fault, $at, $row) {
    my ($struck) = $self->_backup($fault, $at, $row)->records('fault');
    my $name = $struck ? $struck->{name} : '';

    # Between the same two steps of a backup, recovery is used once and the next setup once.
    my $by_recover = ($at + ($fault =~ m/after/)) % 2;
    my @problems = $row->{ends_clean} ? $self->{backend}->problems($self->{outside}) : ();
    push(@problems, $self->_afterwards($by_recover, $row));
    $self->{count}++ if $name ne '';
    my $how = $by_recover ? 'recover' : 'the next setup';
    Test::More::is("@problems", '', "$row->{name}: $fault $name, number $at, $how");
    return @problems ? undef : $name;
}

# What is wrong with the state when no more faults happen.
sub _afterwards ($self, $by_recover, $row) {
    my $clean = $self->_proxy;
    my @problems = $by_recover ? $self->_recover($clean->socket_path) : ();
    $self->{backend}->guest->stop_churn;
    push(@problems, $self->_next_increment($clean->socket_path, $by_recover, $row->{ids}->@*));
    return @problems;
}

# Returns whether everything is right afterwards.
sub pair ($self, $row, $pair) {
    my ($fault, $at, $then) = $pair->@{qw(fault at then)};
    my @struck = $self->_backup($fault, $at, $row, $then // {})->records('fault');
    push(@struck, $self->_second($pair, $row)->records('fault')) if $pair->{by};
    my $by_recover = ($self->{pairs}++) % 2;
    my @problems = $self->_afterwards($by_recover, $row);
    $self->{count}++ if @struck > 1;
    my @second = $pair->{by} ? $pair->@{qw(by next next_at)} : ('then', reverse(%$then));
    my $how = $by_recover ? 'recover' : 'the next setup';
    my $names = join(', ', map { $_->{name} } @struck);
    return Test::More::is("@problems", '', "$row->{name}: $fault $at, @second ($names); $how");
}

# The next action, with the second fault. Returns its proxy.
sub _second ($self, $pair, $row) {
    my $proxy = $self->_proxy(fault => $pair->{next}, at => $pair->{next_at});
    my %options = (qmp => $proxy->socket_path, log => sub { });
    $options{timeout} = $row->{short} if $pair->{next} eq 'stall';
    my $client = $self->client(
        sub ($tell) {
            my %recover = $self->{backend}->options(%options);
            return PVE::BackupAccess->recover(%recover) if $pair->{by} eq 'recover';
            my %backup = (mode => 'use', success => 1, disks => $row->{ids});
            $self->{repository}->backup(%backup, options => \%options);
        }
    );
    1 while defined($client->next_word);
    $client->wait_end;
    $proxy->stop;
    return $proxy;
}

# A process that may be killed, or dies of SIGUSR1.
sub client ($self, $code) {
    return $Client->start(
        sub ($tell) {
            local $SIG{USR1} = sub { die "the signal\n" };
            local $SIG{__WARN__} = sub { };

            # The access ends with the inner eval. The exception of a signal during that is thrown some
            # statements later.
            eval {
                eval { $code->($tell) };
                for my $statement (1 .. 5) { my $done = $statement }
            };
            return;
        }
    );
}

# The number of commands of a backup, and of each next action after a backup that was killed when its access was
# complete.
sub totals ($self, $row) {
    my $backup = $self->_backup('', 0, $row)->commands;
    my %totals = (backup => $backup);
    for my $by (qw(recover setup)) {
        $self->_backup('kill-after', int($backup / 2), $row);
        my $next = $self->_second({ by => $by, next => '', next_at => 0 }, $row);
        $totals{$by} = $next->commands;
        $self->{backend}->guest->stop_churn;
    }
    return \%totals;
}

sub _recover ($self, $path) {
    my @problems;
    my %options = ($self->{backend}->options(qmp => $path), log => sub { });
    eval { PVE::BackupAccess->recover(%options); 1 } or push(@problems, "recover: $@");
    push(@problems, $self->{backend}->problems($self->{outside}));
    my $again = eval { PVE::BackupAccess->recover(%options) } // [$@];
    push(@problems, "recover did something again: $again->@*") if $again->@*;
    return @problems;
}

sub _next_increment ($self, $path, $by_recover, @ids) {
    my ($backend, $repository) = $self->@{qw(backend repository)};
    my (@problems, @warnings);
    my $log = sub ($level, $text) { push(@warnings, $text) if $level eq 'warn' };
    my %backup = (mode => 'use', success => 1, disks => \@ids);
    my $result = eval { $repository->backup(%backup, options => { qmp => $path, log => $log }) }
        or push(@problems, "the next backup: $@");
    $self->{actions}{ $_->{action} }++ for values(($result // {})->%*);
    push(@problems, "the next backup warns after recover: @warnings") if $by_recover && @warnings;
    push(@problems, $backend->problems($self->{outside}));

    for my $id (@ids) {
        push(@problems, "$id: what is restored is not the disk")
            if File::Compare::compare($repository->image($id), $backend->vm->raw_image($id)) != 0;
    }
    return @problems;
}

1;
