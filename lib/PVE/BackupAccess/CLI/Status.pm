package PVE::BackupAccess::CLI::Status;

# The subcommands status, recover and forget.

use v5.36;

use List::Util qw(uniq);

use PVE::BackupAccess;
use PVE::BackupAccess::CLI::Access qw(access_options show_wait status_of text);
use PVE::BackupAccess::CLI::Output qw(say_error say_json say_out say_table);
use PVE::BackupAccess::Format qw(bytes);

my sub shown ($value) { return $value // 'unknown' }

my sub print_access ($access) {
    if (!$access) {
        say_out('no backup is running');
        return;
    }
    my $process = !defined($access->{pid}) ? 'another program' : "process $access->{pid}";
    $process .= ', which is dead' if defined($access->{alive}) && !$access->{alive};
    $process .= ' (this host cannot tell whether it runs)'
        if defined($access->{pid}) && !defined($access->{alive});
    say_out('backup access: target ' . shown($access->{'target-id'}) . ", $process");
    say_out('  devices: ' . join(', ', $access->{devices}->@*)) if $access->{devices}->@*;
}

my sub state_of ($bitmap) {
    return join(', ',
        ($bitmap->{background} ? 'records for the access' : ()),
        ($bitmap->{inconsistent} ? 'cannot be used' : ()),
        (!$bitmap->{inconsistent} && !$bitmap->{recording} ? 'frozen' : ()),
        ($bitmap->{recording} && !$bitmap->{background} ? 'recording' : ()),
        ($bitmap->{persistent} ? 'persistent' : ()),
    );
}

my sub print_bitmaps ($bitmaps) {
    if (!$bitmaps->@*) {
        say_out('no bitmaps: the next backup of every device is a full one');
        return;
    }
    my @rows = map {
        [
            shown($_->{'target-id'}), shown($_->{device}),
            bytes($_->{'dirty-bytes'} // 0), state_of($_),
            $_->{base} // '',
        ]
    } $bitmaps->@*;
    say_out('');
    say_table([[qw(TARGET DEVICE DIRTY STATE), 'SINCE BACKUP'], @rows], 2);
}

my sub print_fleecing ($images) {
    return if !$images->@*;
    my @rows = map {
        [
            $_->{device},
            bytes($_->{'image-bytes'} // 0),
            bytes($_->{size} // 0),
            defined($_->{'free-bytes'}) ? bytes($_->{'free-bytes'}) : '',
            $_->{file} // $_->{node} // '',
        ]
    } $images->@*;
    say_out('');
    say_table([['FLEECING', qw(USED SIZE FREE IMAGE)], @rows], 1, 2, 3);
}

my sub print_exports ($exports) {
    return if !$exports->@*;
    my @rows
        = map { [$_->{id}, $_->{type}, $_->{node}, $_->{ours} ? 'ours' : "another program's"] }
        $exports->@*;
    say_out('');
    say_table([[qw(EXPORT TYPE NODE), 'OWNER'], @rows]);
}

my sub print_left_overs ($things) {
    return if !$things->@*;
    say_out('',
              "left behind by a killed process; the next backup of the target, or 'recover',"
            . ' removes it:');
    for my $thing ($things->@*) {
        my $of = join(', ', grep { defined } $thing->@{qw(target-id device)});
        say_out("  $thing->{what}" . ($of ne '' ? " ($of)" : ''));
    }
}

sub run ($opt) {
    my $status = status_of($opt);
    if ($opt->{json}) {
        say_json($status);
        return 0;
    }
    say_out('backend: ' . ($status->{backend} eq 'pve' ? 'Proxmox VE' : 'stock QEMU'));
    print_access($status->{access});
    print_bitmaps($status->{bitmaps});
    print_fleecing($status->{fleecing});
    print_exports($status->{exports});
    print_left_overs($status->{'left-overs'});
    say_out('', map { "warning: $_" } $status->{warnings}->@*) if $status->{warnings}->@*;
    return 0;
}

# The targets that have bitmaps; an empty list if --target-id is one of them.
my sub other_targets ($opt) {
    my $given = text($opt->{'target-id'});
    my @targets
        = uniq(sort grep { defined } map { $_->{'target-id'} } status_of($opt)->{bitmaps}->@*);
    return (grep { $_ eq $given } @targets) ? () : @targets;
}

# --target-id may be misspelt, or may lack the suffix that the command appends for its own backups.
my sub unknown ($opt, @others) {
    return "target '$opt->{'target-id'}' has no bitmaps - "
        . (@others ? "targets that have: @others" : 'no other target has any');
}

# Undoes what a killed process left behind, without making a backup. Scripts call this unconditionally, so it is no
# error if there is nothing to undo.
sub recover ($opt) {
    my $nothing = sub {
        my @others = other_targets($opt);
        say_error('nothing to undo' . (@others ? ': ' . unknown($opt, @others) : ''));
        return 0;
    };
    return _say_done($opt, 'recover', $nothing);
}

# Removes the bitmaps of a target.
sub forget ($opt) {
    my $nothing = sub {
        my @others = other_targets($opt);
        die unknown($opt, @others) . "\n" if @others;
        say_error(unknown($opt));
        return 0;
    };
    return _say_done($opt, 'forget', $nothing);
}

sub _say_done ($opt, $method, $nothing) {
    my $lines = PVE::BackupAccess->$method(
        access_options($opt),
        'target-id' => text($opt->{'target-id'}),
        $opt->{force} ? (force => 1) : (),
        log => \&show_wait,
    );
    $opt->{json} ? say_json($lines) : say_out($lines->@*);
    return $lines->@* ? 0 : $nothing->();
}

1;
